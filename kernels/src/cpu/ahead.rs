//! Asking for memory while multiplying.
//!
//! A processor keeps a dozen or two cache lines in flight. Asked for in one go, more than that wait for each other and the
//! kernel with them; a few for each block of a tile are on their way while the arithmetic goes on.

/// Asks for what is there to come into the nearest cache.
#[inline(always)]
pub(super) fn near<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction; it has no effect that a program can observe, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
}

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// What is asked for while a tile is computed.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Needed in the next tiles: for the nearest cache.
    pub(super) near: Stream,
    /// Needed after them: for the second-level cache.
    pub(super) far: Stream,
}

/// Neighbouring cache lines, some for each block of a tile.
#[derive(Clone, Copy)]
pub(super) struct Stream {
    next: *const u8,
    lines_per_block: usize,
}

impl Stream {
    /// All lines of `bytes`, or a few more, over the blocks of a tile.
    #[inline(always)]
    pub(super) fn new(bytes: &[u8], blocks: usize) -> Self {
        Self { next: bytes.as_ptr(), lines_per_block: bytes.len().div_ceil(LINE).div_ceil(blocks) }
    }

    /// Asks for a block's lines to come into the nearest cache.
    #[inline(always)]
    pub(super) fn ask_near(&mut self) {
        for _ in 0..self.lines_per_block {
            near(self.next);
            self.next = self.next.wrapping_add(LINE);
        }
    }

    /// Asks for a block's lines to come into the second-level cache.
    #[inline(always)]
    pub(super) fn ask_far(&mut self) {
        for _ in 0..self.lines_per_block {
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                // SAFETY: as above.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.cast()) };
            }
            self.next = self.next.wrapping_add(LINE);
        }
    }
}

impl Ahead {
    /// Asks for everything at once, where a kernel does not ask itself.
    pub(super) fn ask(mut self, blocks: usize) {
        for _ in 0..blocks {
            self.near.ask_near();
            self.far.ask_far();
        }
    }
}

/// Some slices, taken from the front in pieces of about the same length.
pub(super) struct Reads<'a, I> {
    slices: I,
    rest: &'a [u8],
    /// Bytes of a piece.
    each: usize,
    /// What pieces at the ends of slices were shorter, so far.
    owed: usize,
}

impl<'a, I: Iterator<Item = &'a [u8]>> Reads<'a, I> {
    pub(super) fn new(slices: I, each: usize) -> Self {
        Self { slices, rest: &[], each, owed: 0 }
    }

    /// The next piece, of one slice; nothing when all have been taken.
    #[inline]
    pub(super) fn next(&mut self) -> &'a [u8] {
        if self.each == 0 {
            return &[];
        }
        if self.rest.is_empty() {
            self.rest = self.slices.next().unwrap_or_default();
        }
        let most = self.each + self.owed;
        let (now, rest) = self.rest.split_at(self.rest.len().min(most));
        (self.rest, self.owed) = (rest, most - now.len());
        now
    }
}
