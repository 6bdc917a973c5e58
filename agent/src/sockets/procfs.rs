//! Reads connections from `/proc/net/tcp` and `/proc/net/tcp6`, whose format is the kernel's
//! `Documentation/networking/proc_net_tcp.rst`: the remote port and the state, and nothing of how a
//! connection fares.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use super::{COUNTED, Connection};

/// A table that is longer, of some hundred thousand connections, takes too long to read each second.
const LARGEST_BYTES: u64 = 32 << 20;

/// Gives each connection to the port.
pub(super) fn dump(net: &Path, port: u16, mut each: impl FnMut(Connection)) -> io::Result<()> {
    read(File::open(net.join("tcp"))?, port, &mut each)?;
    match File::open(net.join("tcp6")) {
        Ok(file) => read(file, port, &mut each),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn read(table: impl Read, port: u16, each: &mut impl FnMut(Connection)) -> io::Result<()> {
    let mut table = BufReader::new(table).take(LARGEST_BYTES);
    let mut line = String::new();
    while table.read_line(&mut line)? > 0 {
        if let Some(connection) = connection(&line, port) {
            each(connection);
        }
        line.clear();
    }
    if table.limit() == 0 {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(())
}

fn connection(line: &str, port: u16) -> Option<Connection> {
    let mut fields = line.split_ascii_whitespace();
    let (_, remote_port) = fields.nth(2)?.rsplit_once(':')?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let is_counted = u16::from_str_radix(remote_port, 16) == Ok(port) && COUNTED.contains(&state);
    is_counted.then_some(Connection {
        state,
        cookie: 0,
        info: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.18 writes it, for a client and a server on one host.
    const TCP: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 262938 1 000000004d1507c4 100 0 0 10 0
   1: 0100007F:8AE1 0100007F:1538 01 00000000:00000000 00:00000000 00000000     0        0 261952 1 0000000090827130 20 4 0 10 -1
   2: 0100007F:1538 0100007F:8AE1 01 00000000:00000000 00:00000000 00000000     0        0 261953 1 0000000090827131 20 4 0 10 -1
   3: 0100007F:9D77 0100007F:1538 06 00000000:00000000 03:00001770 00000000     0        0 0 3 00000000bdf93fad
   4: 0100007F:9D78 0100007F:1538 08 00000000:00000000 00:00000000 00000000     0        0 261954 1 00000000bdf93fae 20 4 0 10 -1
";
    const TCP6: &str = "\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0000000000000000FFFF00000100007F:C001 0000000000000000FFFF00000100007F:1538 02 00000000:00000001 01:00000064 00000000     0        0 0 2 00000000bdf93faf
";

    fn states(table: &str) -> Vec<u8> {
        let mut states = Vec::new();
        let mut each = |connection: Connection| states.push(connection.state);
        read(table.as_bytes(), 5432, &mut each).unwrap();
        states
    }

    #[test]
    fn tables_are_read() {
        assert_eq!(states(TCP), [1, 8]);
        assert_eq!(states(TCP6), [2]);
    }

    #[test]
    fn other_text_has_no_connections() {
        for text in [
            "",
            "\n",
            "0: a:1538 b:1538",
            "0: a:1538 b:11538 01",
            "0: a:1538 b 01",
            "0: a:1 b:1538 zz",
        ] {
            assert!(states(text).is_empty(), "{text:?}");
        }
    }
}
