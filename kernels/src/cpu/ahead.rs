//! Asking for memory before it is read.
//!
//! A processor keeps a dozen or two cache lines in flight. Asked for in one go, more than that wait for each other and the
//! kernel with them; a few in every turn of a loop are on their way while the arithmetic goes on.

use std::ops::Range;

use super::pages::LINE;

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
    end: *const u8,
    lines_each: usize,
}

impl Ahead {
    /// All lines of `bytes`, or a few more, over so many turns.
    #[inline(always)]
    pub(super) fn new(bytes: &[u8], turns: usize) -> Self {
        let lines_each = bytes.len().div_ceil(LINE).div_ceil(turns.max(1));
        let Range { start: next, end } = bytes.as_ptr_range();
        Self { next, end, lines_each }
    }

    /// Asks for one turn's lines, if not all have been asked for.
    #[inline(always)]
    pub(super) fn ask(&mut self) {
        if self.next >= self.end {
            return;
        }
        for _ in 0..self.lines_each {
            ask(self.next);
            self.next = self.next.wrapping_add(LINE);
        }
    }

    /// Asks for everything at once, where a kernel does not ask itself.
    pub(super) fn ask_all(mut self) {
        while self.next < self.end {
            self.ask();
        }
    }
}
