//! Values that can be told from their number alone, so that nobody has to keep them to compare them.

/// A small generator of well-mixed numbers (splitmix64): for choosing, and for bytes that don't compress.
#[derive(Clone, Debug)]
pub struct Mixer(u64);

impl Mixer {
    pub fn new(seed: u64) -> Mixer {
        Mixer(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }
}

/// Appends the `len` bytes of value `number`. They don't compress: evrepl finds nothing to save on them, the worst case
/// for the network.
pub fn append(value: &mut Vec<u8>, number: u64, len: usize) {
    let end = value.len() + len;
    let mut mixer = Mixer::new(number);
    while value.len() + 8 <= end {
        value.extend_from_slice(&mixer.draw().to_le_bytes());
    }
    let rest = end - value.len();
    value.extend_from_slice(&mixer.draw().to_le_bytes()[..rest]);
}

/// Values of one length that cost next to nothing to make: one stretch of noise, in which each number changes every eighth
/// byte and those between in the same way. No two numbers share four bytes in a row but by chance, so nothing compresses.
#[derive(Clone, Debug)]
pub struct Values {
    noise: Vec<u64>,
    len: usize,
}

impl Values {
    /// Of `len` bytes each.
    pub fn new(len: usize) -> Values {
        let mut mixer = Mixer::new(len as u64);
        Values {
            noise: (0..len.div_ceil(8)).map(|_| mixer.draw()).collect(),
            len,
        }
    }

    /// Bytes of each value.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether they have no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the value of `number`.
    pub fn append(&self, value: &mut Vec<u8>, number: u64) {
        let end = value.len() + self.len;
        let mask = Mixer::new(number).draw();
        value.extend(self.noise.iter().flat_map(|word| (word ^ mask).to_le_bytes()));
        value.truncate(end);
    }

    /// Whether `value` is that of `number`.
    pub fn is(&self, value: &[u8], number: u64) -> bool {
        let mask = Mixer::new(number).draw();
        let same = |(word, found): (&u64, &[u8])| (word ^ mask).to_le_bytes()[..found.len()] == *found;
        value.len() == self.len && self.noise.iter().zip(value.chunks(8)).all(same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cheap_values_are_told_apart_and_do_not_compress() {
        for len in [0, 1, 7, 8, 100, 1_024] {
            let values = Values::new(len);
            let mut all = Vec::new();
            for number in 0..200 {
                let from = all.len();
                values.append(&mut all, number);
                assert!(all.len() - from == len && values.is(&all[from..], number));
                assert!(len < 4 || !values.is(&all[from..], number + 1));
                assert!(!values.is(&all[from..], number) || !values.is(&[&all[from..], b"x"].concat(), number));
            }
            if len >= 100 {
                // evrepl compresses with LZ4, which looks for four equal bytes.
                let mut seen = std::collections::HashSet::new();
                let again = all.windows(4).filter(|four| !seen.insert(*four)).count();
                assert!(again * 1_000 < all.len(), "{again} of {}", all.len());
            }
        }
    }

    #[test]
    fn a_value_is_its_number_and_length_and_nothing_else() {
        let value = |number, len| {
            let mut value = Vec::new();
            append(&mut value, number, len);
            value
        };
        assert_eq!(value(7, 100), value(7, 100));
        assert_eq!(value(7, 100)[..96], value(7, 1_024)[..96]);
        assert_ne!(value(7, 100), value(8, 100));
        for len in [0, 1, 7, 8, 9, 1_024] {
            assert_eq!(value(1, len).len(), len);
        }
    }
}
