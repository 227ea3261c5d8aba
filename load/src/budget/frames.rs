//! Which functions stand at an address, those included that the compiler put into others.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use addr2line::Loader;

/// One function at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// As it is written in the source, without the hash; empty when the line table knows no name.
    pub function: String,
    /// The crate and the path in it, `tokio/src/runtime/mod.rs`; `std/…` for Rust's own library.
    pub file: String,
}

/// The line tables of the program and of the libraries that it loads.
#[derive(Default)]
pub struct Frames {
    objects: HashMap<String, Object>,
}

struct Object {
    loader: Option<Loader>,
    found: HashMap<u64, Rc<[Frame]>>,
}

impl Frames {
    /// The frames at an address of an object, the innermost first; none when the object has no line table.
    pub fn at(&mut self, object: &str, address: u64) -> Rc<[Frame]> {
        if !self.objects.contains_key(object) {
            self.objects.insert(object.into(), Object::open(object));
        }
        let object = self.objects.get_mut(object).expect("it is there now");
        if let Some(frames) = object.found.get(&address) {
            return Rc::clone(frames);
        }
        let frames: Rc<[Frame]> = object.look_up(address).into();
        object.found.insert(address, Rc::clone(&frames));
        frames
    }
}

impl Object {
    fn open(path: &str) -> Object {
        Object {
            loader: Path::new(path).is_file().then(|| Loader::new(path).ok()).flatten(),
            found: HashMap::new(),
        }
    }

    fn look_up(&self, address: u64) -> Vec<Frame> {
        let Some(mut frames) = self.loader.as_ref().and_then(|loader| loader.find_frames(address).ok()) else {
            return Vec::new();
        };
        let mut all = Vec::new();
        while let Ok(Some(frame)) = frames.next() {
            let function = frame.function.as_ref().and_then(|name| name.raw_name().ok());
            let file = frame.location.as_ref().and_then(|location| location.file);
            all.push(Frame {
                function: function.map_or_else(String::new, |name| plain(&name)),
                file: file.map_or_else(String::new, crate_path),
            });
        }
        all
    }
}

/// A symbol as it is written in the source.
pub fn plain(symbol: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(symbol))
}

/// `/home/…/registry/src/index…/tokio-1.49.0/src/x.rs` is `tokio/src/x.rs`, `/rustc/…/library/core/src/y.rs` is
/// `std/core/src/y.rs`, and what is in neither place is evrepl's own.
fn crate_path(path: &str) -> String {
    if let Some((_, rest)) = path.split_once("/registry/src/")
        && let Some((_, rest)) = rest.split_once('/')
        && let Some((name, file)) = rest.split_once('/')
    {
        // `md-5-0.11.0`: what a version begins with is a number and a dot.
        let is_version = |text: &str| {
            let rest = text.trim_start_matches(|digit: char| digit.is_ascii_digit());
            rest.len() < text.len() && rest.starts_with('.')
        };
        let version = name.match_indices('-').find(|(at, _)| is_version(&name[at + 1..]));
        return format!("{}/{file}", version.map_or(name, |(at, _)| &name[..at]));
    }
    if let Some((_, file)) = path.split_once("/library/") {
        return format!("std/{file}");
    }
    match path.rsplit_once("/src/") {
        Some((_, file)) if path.starts_with('/') => format!("evrepl/src/{file}"),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_named_by_their_crate() {
        for (path, short) in [
            (
                "/root/.cargo/registry/src/index.crates.io-1949/md-5-0.11.0/src/lib.rs",
                "md-5/src/lib.rs",
            ),
            (
                "/root/.cargo/registry/src/index/rdkafka-sys-4.10.0+2.12.1/librdkafka/src/rdbuf.c",
                "rdkafka-sys/librdkafka/src/rdbuf.c",
            ),
            ("/rustc/abc/library/core/src/ptr/mod.rs", "std/core/src/ptr/mod.rs"),
            ("/work/main/src/event/mod.rs", "evrepl/src/event/mod.rs"),
            ("../sysdeps/x86_64/memcpy.S", "../sysdeps/x86_64/memcpy.S"),
        ] {
            assert_eq!(crate_path(path), short);
        }
    }

    #[test]
    fn our_own_code_has_frames() {
        let here = std::env::current_exe().unwrap().to_string_lossy().into_owned();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let begin = maps.lines().find(|line| line.ends_with(&here)).unwrap();
        let begin = u64::from_str_radix(begin.split('-').next().unwrap(), 16).unwrap();
        let address = crate_path as *const () as u64 - begin;
        let mut frames = Frames::default();
        let found = frames.at(&here, address);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].function.ends_with("crate_path"), "{found:?}");
        assert!(found[0].file.ends_with("src/budget/frames.rs"), "{found:?}");
        assert!(frames.at("/no/such/file", 0).is_empty());
    }
}
