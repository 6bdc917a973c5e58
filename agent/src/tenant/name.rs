//! The name of a tenant as it was found, without an allocation: it is looked up for each request, and mostly known.

use std::{fmt, ops::Deref};

use coalmine_proto::names::MAX_NAME_BYTES;

/// A name that may be used.
#[derive(Clone)]
pub enum Name<'a> {
    /// As it stands in the request.
    Borrowed(&'a str),
    /// Made of what stands there.
    Made(Made),
}

/// A name that does not stand in the request as it is.
#[derive(Clone)]
pub struct Made {
    bytes: [u8; MAX_NAME_BYTES],
    length: usize,
}

impl Name<'_> {
    /// A copy of a name; none of one that is too long to be a name.
    pub(super) fn made(name: &str) -> Option<Self> {
        let mut bytes = [0_u8; MAX_NAME_BYTES];
        let length = name.len();
        bytes.get_mut(..length)?.copy_from_slice(name.as_bytes());
        Some(Self::Made(Made { bytes, length }))
    }
}

impl Made {
    fn as_str(&self) -> &str {
        let name = self.bytes.get(..self.length).unwrap_or_default();
        std::str::from_utf8(name).unwrap_or_default()
    }
}

impl Deref for Name<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Borrowed(name) => name,
            Self::Made(made) => made.as_str(),
        }
    }
}

impl PartialEq for Name<'_> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Name<'_> {}

impl fmt::Debug for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &**self)
    }
}
