//! A prompt as a growing chain of texts, and the keys of its full blocks.

/// A text of some length; equal ids are equal texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Text {
    pub(super) id: u64,
    pub(super) tokens: u32,
}

/// What an agent sends to the model.
///
/// A block's key digests everything from the prompt's start to the block's end, so equal keys are equal prefixes.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    block_size: u32,
    tokens: u32,
    digest: u64,
    keys: Vec<u64>,
    texts: Vec<u64>,
}

impl Prompt {
    pub(super) fn new(block_size: u32) -> Self {
        Self { block_size, tokens: 0, digest: 0x9E37_79B9_7F4A_7C15, keys: Vec::new(), texts: Vec::new() }
    }

    pub(super) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// The keys of its full blocks.
    pub(super) fn keys(&self) -> &[u64] {
        &self.keys
    }

    /// The ids of its texts, in order.
    pub(super) fn texts(&self) -> &[u64] {
        &self.texts
    }

    pub(super) fn add(&mut self, text: Text) -> &mut Self {
        self.texts.push(text.id);
        let mut done = 0;
        while done < text.tokens {
            let room = self.block_size - self.tokens % self.block_size;
            let taken = room.min(text.tokens - done);
            self.digest = mix(mix(self.digest ^ text.id) ^ (u64::from(done) << 32 | u64::from(taken)));
            self.tokens += taken;
            done += taken;
            if taken == room {
                self.keys.push(self.digest);
            }
        }
        self
    }

    pub(super) fn add_all<'t>(&mut self, texts: impl IntoIterator<Item = &'t Text>) -> &mut Self {
        for &text in texts {
            self.add(text);
        }
        self
    }
}

/// `SplitMix64`'s finaliser.
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_rendered_again_keeps_its_blocks() {
        let (system, answer, more) =
            (Text { id: 1, tokens: 21 }, Text { id: 2, tokens: 30 }, Text { id: 3, tokens: 5 });
        let mut sent = Prompt::new(16);
        sent.add(system);
        let mut decoded = sent.clone();
        decoded.add(answer);
        let mut next = Prompt::new(16);
        next.add(system).add(answer).add(more);
        assert_eq!(sent.keys().len(), 1);
        assert_eq!(decoded.keys().len(), 3);
        assert_eq!(next.keys()[..3], *decoded.keys());
    }

    #[test]
    fn the_same_text_behind_another_prefix_is_another_block() {
        let (a, b, shared) = (Text { id: 1, tokens: 16 }, Text { id: 2, tokens: 16 }, Text { id: 3, tokens: 16 });
        let (mut left, mut right) = (Prompt::new(16), Prompt::new(16));
        left.add(a).add(shared);
        right.add(b).add(shared);
        assert_ne!(left.keys()[1], right.keys()[1]);
    }
}
