//! A region's configuration file as the lab writes it: tables that tests may add to.

use std::collections::BTreeMap;
use std::fmt::Write;

/// TOML tables by name (`""` is the root) with their keys and values, the values as TOML literals.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    tables: BTreeMap<String, BTreeMap<String, String>>,
}

impl Settings {
    /// Sets `table.key` (or a root key without a dot) to a TOML literal: `("batch.linger", "\"5ms\"")`.
    pub(crate) fn set(&mut self, path: &str, literal: &str) {
        let (table, key) = path.rsplit_once('.').unwrap_or(("", path));
        self.tables
            .entry(table.into())
            .or_default()
            .insert(key.into(), literal.into());
    }

    /// Merges simple TOML: `[table]` headers and one `key = value` per line; what was there before gives way.
    ///
    /// # Panics
    /// On anything else, `[[cache]]` and `[[peer]]` above all: those have methods of their own.
    pub(crate) fn merge(&mut self, text: &str) {
        let mut table = String::new();
        for line in text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let header = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            if let Some(name) = header.filter(|name| !name.starts_with('[')) {
                table = name.trim().into();
            } else if let Some((key, value)) = line.split_once('=').filter(|_| header.is_none()) {
                self.tables
                    .entry(table.clone())
                    .or_default()
                    .insert(key.trim().into(), value.trim().into());
            } else {
                panic!("the lab merges [table] and key = value lines only, not {line:?}");
            }
        }
    }

    /// Takes over all of `other`'s settings; they win.
    pub(crate) fn absorb(&mut self, other: Settings) {
        for (table, keys) in other.tables {
            self.tables.entry(table).or_default().extend(keys);
        }
    }

    /// The file's text: root keys, then `arrays` (`[[cache]]`, `[[peer]]`), then the tables.
    pub(crate) fn render(&self, arrays: &str) -> String {
        let mut text = String::new();
        let keys = |text: &mut String, table: &str| {
            for (key, value) in self.tables.get(table).into_iter().flatten() {
                let _ = writeln!(text, "{key} = {value}");
            }
        };
        keys(&mut text, "");
        text.push_str(arrays);
        for table in self.tables.keys().filter(|table| !table.is_empty()) {
            let _ = writeln!(text, "[{table}]");
            keys(&mut text, table);
        }
        text
    }
}

/// A TOML string. The lab's strings are names, addresses and paths, whose Rust and TOML escapes are the same.
pub(crate) fn quoted(text: &str) -> String {
    format!("{text:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_settings_win_and_arrays_stand_between_root_and_tables() {
        let mut settings = Settings::default();
        settings.set("region", &quoted("us-east-1"));
        settings.set("batch.linger", &quoted("2ms"));
        settings.merge("node = \"n\"\n# why\n[batch]\nlinger = \"5ms\"\n\n[flow]\nlanes = 2");
        let text = settings.render("[[cache]]\nname = \"c\"\n");
        assert_eq!(
            text,
            "node = \"n\"\nregion = \"us-east-1\"\n[[cache]]\nname = \"c\"\n[batch]\nlinger = \"5ms\"\n[flow]\nlanes = 2\n"
        );
    }

    #[test]
    #[should_panic(expected = "[table] and key = value lines only")]
    fn arrays_of_tables_are_not_merged() {
        Settings::default().merge("[[peer]]\nregion = \"x\"");
    }
}
