//! What is wrong with a configuration, where it stands, and what to write instead.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the file. Both count from 1; the column counts characters, as editors do.
    File { line: usize, column: usize },
    /// In this environment variable.
    Variable(String),
}

impl Place {
    /// The place of what is missing altogether.
    pub(super) const TOP: Place = Place::File { line: 1, column: 1 };
}

/// One thing that is wrong. `what` also says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    pub place: Place,
    pub what: String,
}

/// Why there is no configuration. Trying again cannot help before somebody changes the file or the environment.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: cannot be read: {source}; name a readable file with `--config`", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    /// Everything that is wrong, in the order of the file, then of the variables' names; never empty.
    #[error("{}", Listing { file, problems })]
    Invalid { file: PathBuf, problems: Vec<Problem> },
}

impl ConfigError {
    /// Every problem, one for each line of the message; none if the file could not even be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            ConfigError::Unreadable { .. } => &[],
            ConfigError::Invalid { problems, .. } => problems,
        }
    }
}

/// One line per problem: `file:line:column: what`, or `VARIABLE: what`.
struct Listing<'a> {
    file: &'a Path,
    problems: &'a [Problem],
}

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match &problem.place {
                Place::File { line, column } => write!(f, "{}:{line}:{column}: ", self.file.display())?,
                Place::Variable(name) => write!(f, "{name}: ")?,
            }
            f.write_str(&problem.what)?;
        }
        Ok(())
    }
}

/// The word of `known` that `written` was probably meant to be.
pub(super) fn near_miss<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // One slip in three letters is still the same word to a reader; more is another word.
    let allowed = (written.chars().count() / 3).max(1);
    let nearest = known
        .into_iter()
        .map(|word| (distance(&written.to_lowercase(), word), word))
        .min();
    nearest
        .filter(|(far, word)| *far <= allowed && *far < word.len())
        .map(|(_, word)| word)
}

/// Insertions, deletions, replacements and swaps of neighbours that lead from one word to the other.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut rows = vec![vec![0usize; to.len() + 1]; from.len() + 1];
    rows[0] = (0..=to.len()).collect();
    for i in 1..=from.len() {
        rows[i][0] = i;
        for j in 1..=to.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_another_word_is_not() {
        assert_eq!(near_miss("lingre", ["linger", "max_items"]), Some("linger"));
        assert_eq!(near_miss("Ketma", ["ketama", "consistent"]), Some("ketama"));
        assert_eq!(near_miss("rendezvous", ["ketama", "consistent"]), None);
        assert_eq!(near_miss("x", ["on"]), None);
        assert_eq!(near_miss("", ["a"]), None);
    }
}
