//! Reads what `valgrind --tool=callgrind --dump-instr=yes --separate-threads=yes` writes: one file for each thread.
//!
//! The format is that of Valgrind's manual, section "Callgrind Format Specification". Files and lines in it are passed over:
//! [`Frames`](super::frames::Frames) knows more about an address than they say.

use std::collections::HashMap;

/// What one thread ran.
#[derive(Debug, Default)]
pub struct Thread {
    pub functions: Vec<Function>,
    pub costs: Vec<Cost>,
    pub calls: Vec<Call>,
}

/// A function as the linker knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Function {
    /// The file of the program or library.
    pub object: String,
    /// Mangled.
    pub name: String,
}

/// Instructions of one function itself, at one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Index into [`Thread::functions`].
    pub function: usize,
    pub address: u64,
    pub instructions: u64,
}

/// Calls of one function from one address of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub caller: usize,
    /// Of the call.
    pub address: u64,
    pub callee: usize,
    pub count: u64,
    /// With everything that the callee called.
    pub instructions: u64,
}

impl Thread {
    /// # Errors
    /// What makes no sense, and in which line.
    pub fn parse(text: &str) -> Result<Thread, String> {
        let mut reader = Reader::default();
        for (number, line) in text.lines().enumerate() {
            reader
                .line(line)
                .ok_or_else(|| format!("line {}: {line:?} makes no sense", number + 1))?;
        }
        let thread = reader.thread;
        let counted = thread.instructions();
        match reader.total {
            Some(total) if total != counted => Err(format!("its lines add up to {counted} instructions, not {total}")),
            _ => Ok(thread),
        }
    }

    /// All that it ran.
    pub fn instructions(&self) -> u64 {
        self.costs.iter().map(|cost| cost.instructions).sum()
    }
}

/// Names that stand once in full, `(7) name`, and then as `(7)`.
#[derive(Default)]
struct Names(HashMap<String, String>);

impl Names {
    fn read(&mut self, text: &str) -> Option<String> {
        let Some(rest) = text.strip_prefix('(') else {
            return Some(text.into());
        };
        let (id, name) = rest.split_once(')')?;
        match name.strip_prefix(' ') {
            Some(name) => {
                self.0.insert(id.into(), name.into());
                Some(name.into())
            }
            None => self.0.get(id).cloned(),
        }
    }
}

#[derive(Default)]
struct Reader {
    thread: Thread,
    known: HashMap<Function, usize>,
    objects: Names,
    names: Names,
    object: String,
    function: Option<usize>,
    /// `cob=` holds for the next call only.
    callee_object: Option<String>,
    callee: Option<usize>,
    /// The count of a call; the next line says from where, and what it cost.
    call: Option<u64>,
    /// The address of the line before.
    address: u64,
    total: Option<u64>,
}

impl Reader {
    fn line(&mut self, line: &str) -> Option<()> {
        if line.starts_with(|first: char| first.is_ascii_digit() || matches!(first, '+' | '-' | '*')) {
            return self.cost(line);
        }
        let Some((key, value)) = line.split_once(['=', ':']) else {
            return (line.trim().is_empty() || line.starts_with('#')).then_some(());
        };
        match key {
            "positions" if value.trim() != "instr line" => return None,
            "events" if value.trim() != "Ir" => return None,
            "ob" => self.object = self.objects.read(value)?,
            "fn" => {
                let name = self.names.read(value)?;
                self.function = Some(self.known(self.object.clone(), name));
            }
            "cob" => self.callee_object = Some(self.objects.read(value)?),
            "cfn" => {
                let name = self.names.read(value)?;
                let object = self.callee_object.take().unwrap_or_else(|| self.object.clone());
                self.callee = Some(self.known(object, name));
            }
            "calls" => {
                // Behind it stands where the callee begins.
                let count = value.split_whitespace().next()?;
                self.call = Some(count.parse().ok()?);
            }
            "totals" => self.total = Some(value.trim().parse().ok()?),
            // Who made it and how; files, which the addresses tell better.
            _ => {}
        }
        Some(())
    }

    /// `<address> <line> <instructions>`; the line's number does not matter here.
    fn cost(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_whitespace();
        let address = self.position(words.next()?)?;
        let _line = words.next()?;
        // A line without a number means none.
        let instructions = words.next().map_or(Some(0), |word| word.parse().ok())?;
        self.address = address;
        let function = self.function?;
        match self.call.take() {
            Some(count) => self.thread.calls.push(Call {
                caller: function,
                address,
                callee: self.callee?,
                count,
                instructions,
            }),
            None => self.thread.costs.push(Cost {
                function,
                address,
                instructions,
            }),
        }
        Some(())
    }

    /// An address, or how far it is from the one before.
    fn position(&self, word: &str) -> Option<u64> {
        let hex = |digits: &str| u64::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16).ok();
        match word.as_bytes().first()? {
            b'*' => Some(self.address),
            b'+' => self.address.checked_add(hex(&word[1..])?),
            b'-' => self.address.checked_sub(hex(&word[1..])?),
            _ => hex(word),
        }
    }

    fn known(&mut self, object: String, name: String) -> usize {
        let functions = &mut self.thread.functions;
        let function = Function { object, name };
        *self.known.entry(function).or_insert_with_key(|function| {
            functions.push(function.clone());
            functions.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two functions of the program and one of the C library, with names and addresses in short.
    const TEXT: &str = "# callgrind format
version: 1
cmd:  evrepl run
thread: 2
desc: Trigger: Program termination
positions: instr line
events: Ir
summary: 134

ob=(1) /bin/evrepl
fl=(1) a.rs
fn=(1) main
0x10b0 7 10
+10 * 4
cfi=(2) b.rs
cfn=(2) look
calls=3 0x2000 9
* 8 110
cob=(2) /lib/libc.so.6
cfn=(3) malloc
calls=1 0x80 0
+5 * 10

fn=(2)
0x2000 9 100
fi=(1)
-f +1 10

ob=(2)
fn=(3)
0x80 0 10

totals: 134
";

    #[test]
    fn names_and_addresses_in_short_are_read() {
        let thread = Thread::parse(TEXT).unwrap();
        let names: Vec<_> = thread
            .functions
            .iter()
            .map(|one| (one.object.as_str(), one.name.as_str()))
            .collect();
        let (evrepl, libc) = ("/bin/evrepl", "/lib/libc.so.6");
        assert_eq!(names, [(evrepl, "main"), (evrepl, "look"), (libc, "malloc")]);
        let costs: Vec<_> = thread
            .costs
            .iter()
            .map(|one| (one.function, one.address, one.instructions))
            .collect();
        assert_eq!(
            costs,
            [
                (0, 0x10b0, 10),
                (0, 0x10c0, 4),
                (1, 0x2000, 100),
                (1, 0x1ff1, 10),
                (2, 0x80, 10)
            ]
        );
        let calls: Vec<_> = thread
            .calls
            .iter()
            .map(|one| (one.address, one.callee, one.count, one.instructions))
            .collect();
        assert_eq!(calls, [(0x10c0, 1, 3, 110), (0x10c5, 2, 1, 10)]);
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        for (wrong, word) in [
            (TEXT.replace("totals: 134", "totals: 135"), "135"),
            (TEXT.replace("+10 * 4", "+10 * x"), "makes no sense"),
            (TEXT.replace("fn=(2)\n", "fn=(9)\n"), "fn=(9)"),
            (TEXT.replace("positions: instr line", "positions: line"), "positions"),
        ] {
            let error = Thread::parse(&wrong).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
