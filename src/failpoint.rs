//! Failpoints that strike certain events only, for tests; a build without the feature `failpoints` has none of them.

/// Does what `FAILPOINTS` says of `name` if one of these keys begins with `panic!`.
#[cfg(feature = "failpoints")]
pub fn at_keys<'a>(name: &str, mut keys: impl Iterator<Item = &'a bytes::Bytes>) {
    fail::fail_point!(name, keys.any(|key| key.starts_with(b"panic!")), |_| ());
}

/// Nothing: the iterator is never asked.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn at_keys<'a>(_: &str, _: impl Iterator<Item = &'a bytes::Bytes>) {}
