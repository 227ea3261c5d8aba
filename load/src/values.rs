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

#[cfg(test)]
mod tests {
    use super::*;

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
