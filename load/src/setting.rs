//! A setting of all evrepl processes, as `--set` has it.

/// `TABLE.KEY=LITERAL`, such as `batch.linger="5ms"`.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// `batch`.
    pub table: String,
    /// `linger`.
    pub key: String,
    /// In TOML: `"5ms"`, with its quotes.
    pub literal: String,
}

impl Setting {
    /// Whether there is such a setting, evrepl says itself.
    ///
    /// # Errors
    /// When it is not of that form, or the literal is no TOML: most often a shell has taken its quotes.
    pub fn parse(text: &str) -> Result<Setting, String> {
        let parts = text
            .split_once('=')
            .and_then(|(path, literal)| Some((path.rsplit_once('.')?, literal)));
        let Some(((table, key), literal)) = parts else {
            return Err(format!("--set {text}: expected TABLE.KEY=LITERAL"));
        };
        if toml_span::parse(&format!("value = {literal}")).is_err() {
            return Err(format!(
                "--set {text}: {literal} is no TOML literal; text needs quotes, and a shell takes them unless they are quoted: \
                 --set '{table}.{key}=\"{literal}\"'"
            ));
        }
        Ok(Setting {
            table: table.to_owned(),
            key: key.to_owned(),
            literal: literal.to_owned(),
        })
    }

    /// As lines of a configuration.
    pub fn lines(&self) -> String {
        let Setting { table, key, literal } = self;
        format!("\n[{table}]\n{key} = {literal}\n")
    }

    /// `batch.linger`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.table, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_whose_quotes_a_shell_has_taken_is_refused_at_once() {
        let setting = Setting::parse(r#"kafka.properties={ "linger.ms" = "5" }"#).unwrap();
        assert_eq!(setting.path(), "kafka.properties");
        assert_eq!(setting.lines(), "\n[kafka]\nproperties = { \"linger.ms\" = \"5\" }\n");
        assert_eq!(Setting::parse("flow.lanes=2").unwrap().literal, "2");
        let error = Setting::parse("batch.compression=none").unwrap_err();
        assert!(error.contains(r#"--set 'batch.compression="none"'"#), "{error}");
        assert!(Setting::parse("lanes=2").is_err() && Setting::parse("flow.lanes").is_err());
    }
}
