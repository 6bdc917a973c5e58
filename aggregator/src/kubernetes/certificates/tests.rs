//! Each state of the Secret, and a year of renewals: whatever an API server trusts, it takes what is served.
//!
//! Certificates are judged by a handshake of TLS, whose clock is the test's.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    time_provider::TimeProvider,
};

use super::{
    Names,
    authority::{AUTHORITY_LIFE, Authority, LEAF_LIFE, Leaf},
    plan::{
        AUTHORITIES, AUTHORITY_KEY, Data, Holding, LEAF, LEAF_KEY, Plan, Publication, RETIRED, Reason,
        SETTLED,
    },
};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// When the tests take place.
const NOW: u64 = 1_800_000_000;

/// An API server may see the webhook configuration as it was so long ago.
const SEEN_LATE: u64 = 9 * MINUTE;

fn names() -> Vec<String> {
    Names {
        namespace: "coalmine".to_owned(),
        secret: "coalmine-webhook".to_owned(),
        configuration: "coalmine".to_owned(),
        service: "coalmine".to_owned(),
        others: vec!["127.0.0.1".to_owned()],
    }
    .in_certificate()
}

fn read(data: &Data, now: u64) -> Holding {
    Holding::read(data, None, &names(), now)
}

fn plan(data: &Data, now: u64) -> Plan {
    read(data, now).plan(None, now)
}

fn fresh(now: u64) -> Data {
    let plan = plan(&Data::new(), now);
    assert_eq!(plan, Plan::RenewAll(Reason::Empty));
    read(&Data::new(), now).carried_out(&plan, &names(), now).unwrap()
}

fn text<'a>(data: &'a Data, key: &str) -> &'a str {
    std::str::from_utf8(&data[key]).unwrap()
}

fn authorities(bundle: &str) -> usize {
    bundle.matches("BEGIN CERTIFICATE").count()
}

/// A clock that stands.
#[derive(Debug)]
struct At(u64);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(self.0)))
    }
}

/// Whether a client that trusts these CAs takes the certificate.
fn handshake(chain: &str, key: &str, bundle: &str, name: &str, now: u64) -> Result<(), String> {
    let provider = Arc::new(ring::default_provider());
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<_, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        let root = root.unwrap();
        // API servers refuse a CA whose time is over; this client does not look.
        if Authority::read(&root).unwrap().holds(now) {
            roots.add(root).unwrap();
        }
    }
    let client = ClientConfig::builder_with_details(provider, Arc::new(At(now)))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    for _ in 0..8 {
        let mut sent = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut sent).unwrap();
        }
        let mut unread = sent.as_slice();
        while !unread.is_empty() {
            server.read_tls(&mut unread).unwrap();
            server.process_new_packets().map_err(|error| error.to_string())?;
        }
        let mut sent = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut sent).unwrap();
        }
        let mut unread = sent.as_slice();
        while !unread.is_empty() {
            client.read_tls(&mut unread).unwrap();
            client.process_new_packets().map_err(|error| error.to_string())?;
        }
        if !client.is_handshaking() && !server.is_handshaking() {
            return Ok(());
        }
    }
    Err("the handshake does not end".to_owned())
}

fn offered(data: &Data, name: &str, now: u64) -> Result<(), String> {
    let chain = text(data, LEAF);
    handshake(chain, text(data, LEAF_KEY), text(data, AUTHORITIES), name, now)
}

#[test]
fn what_is_made_is_taken_for_its_names_and_for_its_time() {
    let data = fresh(NOW);
    assert_eq!(plan(&data, NOW), Plan::Keep);
    for name in [
        "coalmine.coalmine.svc",
        "coalmine.coalmine.svc.cluster.local",
        "127.0.0.1",
    ] {
        offered(&data, name, NOW).unwrap();
        // An API server whose clock is behind.
        offered(&data, name, NOW - 50 * MINUTE).unwrap();
        offered(&data, name, NOW + LEAF_LIFE - 1).unwrap();
        offered(&data, name, NOW + LEAF_LIFE + 1).unwrap_err();
    }
    for name in ["coalmine", "other.coalmine.svc", "127.0.0.2"] {
        offered(&data, name, NOW).unwrap_err();
    }
    let other = text(&fresh(NOW), AUTHORITIES).to_owned();
    let name = &names()[0];
    handshake(text(&data, LEAF), text(&data, LEAF_KEY), &other, name, NOW).unwrap_err();
}

#[test]
fn each_state_of_the_secret_has_its_plan() {
    fn give(data: &mut Data, key: &str, value: &[u8]) {
        data.insert(key.to_owned(), value.to_vec());
    }
    fn other(data: &mut Data, keys: &[&str]) {
        let other = fresh(NOW);
        for key in keys {
            give(data, key, &other[*key]);
        }
    }
    type Change = fn(&mut Data);
    let cases: [(Change, Plan); 13] = [
        (|_| {}, Plan::Keep),
        (|data| give(data, "another", b"thing"), Plan::Keep),
        (Data::clear, Plan::RenewAll(Reason::Empty)),
        (
            |data| data.values_mut().for_each(Vec::clear),
            Plan::RenewAll(Reason::Empty),
        ),
        (
            |data| drop(data.remove(AUTHORITIES)),
            Plan::RenewAll(Reason::AuthorityUnreadable),
        ),
        (
            |data| {
                give(
                    data,
                    AUTHORITIES,
                    b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                )
            },
            Plan::RenewAll(Reason::AuthorityUnreadable),
        ),
        (
            // A certificate that is not a CA's.
            |data| {
                let leaf = data[LEAF].clone();
                give(data, AUTHORITIES, &leaf);
            },
            Plan::RenewAll(Reason::AuthorityUnreadable),
        ),
        (
            |data| drop(data.remove(AUTHORITY_KEY)),
            Plan::RenewAll(Reason::AuthorityKey),
        ),
        (
            |data| other(data, &[AUTHORITY_KEY]),
            Plan::RenewAll(Reason::AuthorityKey),
        ),
        (
            |data| drop(data.remove(LEAF)),
            Plan::RenewLeaf(Reason::LeafUnreadable),
        ),
        (|data| other(data, &[LEAF_KEY]), Plan::RenewLeaf(Reason::LeafKey)),
        (
            |data| other(data, &[LEAF, LEAF_KEY]),
            Plan::RenewLeaf(Reason::LeafUnsigned),
        ),
        (
            // The CA itself is not for servers.
            |data| {
                let (authority, key) = (data[AUTHORITIES].clone(), data[AUTHORITY_KEY].clone());
                give(data, LEAF, &authority);
                give(data, LEAF_KEY, &key);
            },
            Plan::RenewLeaf(Reason::LeafUnsigned),
        ),
    ];
    for (at, (change, expected)) in cases.into_iter().enumerate() {
        let mut data = fresh(NOW);
        change(&mut data);
        assert_eq!(plan(&data, NOW), expected, "case {at}");
        if expected != Plan::Keep {
            let made = read(&data, NOW).carried_out(&expected, &names(), NOW).unwrap();
            assert_eq!(plan(&made, NOW), Plan::Keep, "case {at}");
            offered(&made, &names()[0], NOW).unwrap();
        }
    }
}

#[test]
fn time_and_names_are_reasons_to_renew() {
    let data = fresh(NOW);
    for (now, expected) in [
        (NOW + 59 * DAY, Plan::Keep),
        (NOW + 61 * DAY, Plan::RenewLeaf(Reason::LeafOld)),
        (NOW + LEAF_LIFE + 1, Plan::RenewLeaf(Reason::LeafOver)),
        (
            NOW + AUTHORITY_LIFE / 3 * 2 + DAY,
            Plan::RenewAll(Reason::AuthorityOld),
        ),
        (NOW + AUTHORITY_LIFE + 1, Plan::RenewAll(Reason::AuthorityOver)),
        (NOW - 2 * HOUR, Plan::RenewAll(Reason::AuthorityOver)),
    ] {
        assert_eq!(plan(&data, now), expected, "{now}");
    }
    let other = ["other.coalmine.svc".to_owned()];
    let held = Holding::read(&data, None, &other, NOW);
    let expected = Plan::RenewLeaf(Reason::LeafNames(other[0].clone()));
    assert_eq!(held.plan(None, NOW), expected);
    let made = held.carried_out(&expected, &other, NOW).unwrap();
    assert_eq!(made[AUTHORITIES], data[AUTHORITIES]);
    offered(&made, &other[0], NOW).unwrap();
}

#[test]
fn what_is_cut_is_renewed() {
    let whole = fresh(NOW);
    for key in [LEAF, LEAF_KEY, AUTHORITIES, AUTHORITY_KEY] {
        for length in (0..whole[key].len() - 10).step_by(17) {
            let mut data = whole.clone();
            data.get_mut(key).unwrap().truncate(length);
            let plan = plan(&data, NOW);
            assert!(
                matches!(plan, Plan::RenewLeaf(_) | Plan::RenewAll(_)),
                "{key} cut at {length}: {plan:?}"
            );
        }
    }
}

#[test]
fn a_new_ca_signs_only_once_it_is_known() {
    let before = fresh(NOW);
    let mut data = before.clone();
    data.remove(AUTHORITY_KEY);
    let lost = plan(&data, NOW);
    let data = read(&data, NOW).carried_out(&lost, &names(), NOW).unwrap();
    assert_eq!(data[LEAF], before[LEAF]);
    assert_eq!(authorities(text(&data, AUTHORITIES)), 2);
    assert!(data[AUTHORITIES].ends_with(&before[AUTHORITIES]));

    let held = read(&data, NOW);
    let mark = held.mark(NOW);
    let other = read(&before, NOW).mark(NOW);
    for (mark, now, expected) in [
        (None, NOW + DAY, Plan::Keep),
        (Some(mark.as_str()), NOW + SETTLED - 1, Plan::Keep),
        (
            Some(mark.as_str()),
            NOW + SETTLED,
            Plan::RenewLeaf(Reason::Settled),
        ),
        // The mark lies ahead, is about another CA, is none.
        (Some(mark.as_str()), NOW - 1, Plan::Keep),
        (Some(other.as_str()), NOW + DAY, Plan::Keep),
        (Some("yesterday"), NOW + DAY, Plan::Keep),
    ] {
        let published = held.published(mark, now);
        assert_eq!(held.plan(published, now), expected, "{mark:?} {now}");
    }

    let now = NOW + SETTLED;
    let data = held
        .carried_out(&Plan::RenewLeaf(Reason::Settled), &names(), now)
        .unwrap();
    assert_ne!(data[LEAF], before[LEAF]);
    assert_eq!(authorities(text(&data, AUTHORITIES)), 2);
    assert_eq!(plan(&data, now + RETIRED - 1), Plan::Keep);
    let now = now + RETIRED;
    assert_eq!(plan(&data, now), Plan::Retire);
    let data = read(&data, now)
        .carried_out(&Plan::Retire, &names(), now)
        .unwrap();
    assert_eq!(authorities(text(&data, AUTHORITIES)), 1);
    assert_eq!(plan(&data, now), Plan::Keep);
    offered(&data, &names()[0], now).unwrap();
}

#[test]
fn the_waiting_begins_anew_when_the_configuration_was_changed() {
    let mut data = fresh(NOW);
    let settled = read(&data, NOW);
    assert!(settled.publication(true, None).is_empty());
    assert_eq!(settled.publication(false, None), [Publication::Publish]);
    data.remove(AUTHORITY_KEY);
    let lost = plan(&data, NOW);
    let data = read(&data, NOW).carried_out(&lost, &names(), NOW).unwrap();
    let changing = read(&data, NOW);
    assert!(changing.publication(true, Some(NOW)).is_empty());
    assert_eq!(changing.publication(true, None), [Publication::Mark]);
    assert_eq!(
        changing.publication(false, None),
        [Publication::Publish, Publication::Mark]
    );
    assert_eq!(
        changing.publication(false, Some(NOW)),
        [Publication::Unmark, Publication::Publish, Publication::Mark]
    );
}

/// A CA that somebody else has made, and a certificate of it.
fn foreign() -> Data {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::OrganizationName, "Somebody");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = params.self_signed(&key).unwrap();
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(names()).unwrap();
    let leaf = leaf
        .signed_by(&leaf_key, &Issuer::from_params(&params, &key))
        .unwrap();
    Data::from([
        (LEAF.to_owned(), leaf.pem().into_bytes()),
        (LEAF_KEY.to_owned(), leaf_key.serialize_pem().into_bytes()),
        (AUTHORITIES.to_owned(), authority.pem().into_bytes()),
        (AUTHORITY_KEY.to_owned(), key.serialize_pem().into_bytes()),
    ])
}

#[test]
fn a_ca_of_somebody_else_is_followed_by_one_of_ours() {
    let theirs = foreign();
    offered(&theirs, &names()[0], NOW).unwrap();
    let expected = Plan::RenewAll(Reason::AuthorityForeign);
    assert_eq!(plan(&theirs, NOW), expected);
    let data = read(&theirs, NOW).carried_out(&expected, &names(), NOW).unwrap();
    assert_eq!(authorities(text(&data, AUTHORITIES)), 2);
    handshake(
        text(&data, LEAF),
        text(&data, LEAF_KEY),
        text(&theirs, AUTHORITIES),
        &names()[0],
        NOW,
    )
    .unwrap();
}

#[test]
fn no_more_than_four_cas_are_kept() {
    let first = fresh(NOW);
    let mut data = first.clone();
    for _ in 0..10 {
        data.remove(AUTHORITY_KEY);
        let lost = plan(&data, NOW);
        data = read(&data, NOW).carried_out(&lost, &names(), NOW).unwrap();
        // The one that has signed what is served is always among them.
        assert!(data[AUTHORITIES].ends_with(&first[AUTHORITIES]));
        assert!(authorities(text(&data, AUTHORITIES)) <= 4);
    }
}

/// The two objects.
#[derive(Default)]
struct Cluster {
    data: Data,
    mark: Option<String>,
    /// What the webhook configuration had API servers trust, and since when.
    bundles: Vec<(u64, String)>,
    plans: Vec<Plan>,
}

impl Cluster {
    /// What some API server may trust now.
    fn seen(&self, now: u64) -> impl Iterator<Item = &str> {
        let ends = self.bundles.iter().skip(1).map(|(since, _)| *since);
        let ends = ends.chain([u64::MAX]);
        self.bundles
            .iter()
            .zip(ends)
            .filter(move |(_, end)| *end > now - SEEN_LATE)
            .map(|((_, bundle), _)| bundle.as_str())
    }

    fn renewed(&self, reason: &Reason) -> usize {
        let of =
            |plan: &&Plan| matches!(plan, Plan::RenewLeaf(found) | Plan::RenewAll(found) if found == reason);
        self.plans.iter().filter(of).count()
    }
}

/// A process that keeps the certificate.
#[derive(Default)]
struct Replica {
    served: Option<Leaf>,
}

impl Replica {
    /// Takes the steps of a round; gives whether it wrote something.
    fn round(&mut self, cluster: &mut Cluster, now: u64) -> bool {
        let mut wrote = false;
        let held = loop {
            let held = Holding::read(&cluster.data, self.served.as_ref(), &names(), now);
            let plan = held.plan(held.published(cluster.mark.as_deref(), now), now);
            if plan == Plan::Keep {
                break held;
            }
            wrote = true;
            if matches!(plan, Plan::RenewLeaf(_) | Plan::RenewAll(_)) {
                cluster.mark = None;
            }
            cluster.data = held.carried_out(&plan, &names(), now).unwrap();
            cluster.plans.push(plan);
            assert!(cluster.plans.len() < 100, "{:?}", cluster.plans);
        };
        self.served = held.leaf().cloned();
        let bundle = held.bundle();
        let current = cluster.bundles.last().is_some_and(|(_, held)| *held == bundle);
        let published = held.published(cluster.mark.as_deref(), now);
        for act in held.publication(current, published) {
            wrote = true;
            match act {
                Publication::Unmark => cluster.mark = None,
                Publication::Publish => cluster.bundles.push((now, bundle.clone())),
                Publication::Mark => cluster.mark = Some(held.mark(now)),
            }
        }
        wrote
    }

    fn check(&self, cluster: &Cluster, now: u64) {
        let leaf = self.served.as_ref().unwrap();
        for bundle in cluster.seen(now) {
            let taken = handshake(&leaf.pem(), leaf.key_pem(), bundle, &names()[0], now);
            assert_eq!(taken, Ok(()), "at {now}, after {:?}", cluster.plans);
        }
    }
}

enum Event {
    /// Somebody empties the Secret.
    Empty,
    /// The first replica restarts.
    Restart,
    /// Somebody takes the certificate's key away.
    LoseKey,
    /// Somebody puts the webhook configuration back as it was before.
    PutBack,
}

impl Event {
    fn happen(&self, cluster: &mut Cluster, replicas: &mut [Replica; 2], now: u64) {
        match self {
            Self::Empty => cluster.data.clear(),
            Self::Restart => replicas[0] = Replica::default(),
            Self::LoseKey => drop(cluster.data.remove(LEAF_KEY)),
            Self::PutBack => {
                let before = cluster.bundles[cluster.bundles.len() - 2].1.clone();
                cluster.bundles.push((now, before));
            }
        }
    }
}

#[test]
fn in_a_year_of_renewals_no_admission_fails() {
    // The CA comes to its age on the 20th day.
    let begin = NOW + AUTHORITY_LIFE - AUTHORITY_LIFE / 3 - 20 * DAY;
    let mut cluster = Cluster {
        data: fresh(NOW),
        ..Cluster::default()
    };
    let mut replicas = [Replica::default(), Replica::default()];
    for replica in &mut replicas {
        replica.round(&mut cluster, begin);
    }
    cluster.plans.clear();
    let events = [
        (30 * DAY, Event::Empty),
        (30 * DAY + 5 * MINUTE, Event::Restart),
        (80 * DAY, Event::LoseKey),
        (110 * DAY, Event::Empty),
        (110 * DAY + 400, Event::PutBack),
        (300 * DAY, Event::Empty),
        (300 * DAY + 2 * MINUTE, Event::Empty),
    ];
    let mut events = events.into_iter().peekable();
    let mut now = begin + HOUR;
    let mut close_until = now;
    let mut steps = 0_usize;
    while now < begin + 365 * DAY {
        while let Some((_, event)) = events.next_if(|(after, _)| begin + after <= now) {
            event.happen(&mut cluster, &mut replicas, now);
            close_until = now + 30 * MINUTE;
        }
        // What an API server sees at the same moment, before anybody has noticed.
        for replica in replicas.iter().filter(|replica| replica.served.is_some()) {
            replica.check(&cluster, now);
        }
        // The second replica is slower, but not in its steps of half a day.
        let lags = now < close_until && steps % 2 == 1;
        for replica in replicas.iter_mut().take(if lags { 1 } else { 2 }) {
            if replica.round(&mut cluster, now) {
                close_until = now + 30 * MINUTE;
            }
            replica.check(&cluster, now);
        }
        let step = if now < close_until { MINUTE } else { 12 * HOUR };
        let next = events.peek().map_or(u64::MAX, |(after, _)| begin + after);
        now = next.min(now + step);
        steps += 1;
    }
    assert_eq!(cluster.renewed(&Reason::AuthorityOld), 1);
    assert_eq!(cluster.renewed(&Reason::Empty), 4);
    // Twice emptied within ten minutes, it is signed once.
    assert_eq!(cluster.renewed(&Reason::Settled), 4);
    assert_eq!(cluster.renewed(&Reason::LeafKey), 1);
    assert!(cluster.renewed(&Reason::LeafOld) >= 3, "{:?}", cluster.plans);
    // Nothing is left of the former ones.
    assert_eq!(authorities(text(&cluster.data, AUTHORITIES)), 1);
}
