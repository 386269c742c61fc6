//! Asking for memory before it is read.
//!
//! A processor keeps a dozen or two cache lines in flight. Asked for in one go, more than that wait for each other and the
//! kernel with them; a few in every turn of a loop are on their way while the arithmetic goes on.

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Asks for what is there to come into the nearest cache.
#[inline(always)]
pub(super) fn ask<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction; it has no effect that a program can observe, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
}

/// Bytes that will be read soon, asked for in the turns of a loop.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    next: *const u8,
    lines_each: usize,
    turns: usize,
}

impl Ahead {
    /// All lines of `bytes`, or a few more, over so many turns.
    #[inline(always)]
    pub(super) fn new(bytes: &[u8], turns: usize) -> Self {
        let lines = bytes.len().div_ceil(LINE);
        let lines_each = lines.div_ceil(turns.max(1));
        Self { next: bytes.as_ptr(), lines_each, turns: if lines == 0 { 0 } else { lines.div_ceil(lines_each) } }
    }

    /// Asks for one turn's lines, if not all have been asked for.
    #[inline(always)]
    pub(super) fn ask(&mut self) {
        if self.turns == 0 {
            return;
        }
        self.turns -= 1;
        for _ in 0..self.lines_each {
            ask(self.next);
            self.next = self.next.wrapping_add(LINE);
        }
    }

    /// Asks for everything at once, where a kernel does not ask itself.
    pub(super) fn ask_all(mut self) {
        while self.turns > 0 {
            self.ask();
        }
    }
}
