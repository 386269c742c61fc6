//! A ring of bytes that writes to the device go through, and who still reads which of them.

use std::collections::VecDeque;
use std::ops::Range;

/// Hands out runs of a buffer of `size` bytes in turn. A run is taken back in the order it was handed out, once its `E`, the
/// event behind the copy that reads it, has passed.
///
/// ```text
///        oldest            head
///  |......|####|#######|####|......|     in use: oldest..head, or, once wrapped, oldest..end and 0..head
/// ```
#[derive(Debug)]
pub(crate) struct Ring<E> {
    size: usize,
    head: usize,
    in_use: VecDeque<(Range<usize>, E)>,
}

/// So that runs do not share cache lines.
const ALIGNED: usize = 256;

impl<E> Ring<E> {
    pub(crate) fn new(size: usize) -> Self {
        Self { size, head: 0, in_use: VecDeque::new() }
    }

    /// The most bytes asked for at once: two runs of them fit, so that one is filled while the other is copied.
    pub(crate) fn run_max(&self) -> usize {
        self.size / 2
    }

    /// Room for `bytes` bytes, once `passed` says of enough events, oldest first, that they have passed. The caller writes
    /// there, enqueues the copy and calls [`Ring::put`].
    ///
    /// # Errors
    /// What `passed` returns; its event is forgotten.
    pub(crate) fn room<X>(
        &mut self,
        bytes: usize,
        mut passed: impl FnMut(E) -> Result<(), X>,
    ) -> Result<Range<usize>, X> {
        debug_assert!(bytes <= self.run_max());
        loop {
            if let Some(start) = self.fits(bytes.next_multiple_of(ALIGNED)) {
                return Ok(start..start + bytes);
            }
            if let Some((_, event)) = self.in_use.pop_front() {
                passed(event)?;
            }
        }
    }

    /// The run that [`Ring::room`] gave is in use until `event` has passed.
    pub(crate) fn put(&mut self, run: Range<usize>, event: E) {
        self.head = run.end.next_multiple_of(ALIGNED).min(self.size);
        self.in_use.push_back((run, event));
    }

    /// Every event of runs in use, oldest first; they are in use no longer.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = E> + '_ {
        self.head = 0;
        self.in_use.drain(..).map(|(_, event)| event)
    }

    fn fits(&self, bytes: usize) -> Option<usize> {
        let Some((oldest, _)) = self.in_use.front() else { return Some(0) };
        if self.head > oldest.start {
            if self.head + bytes <= self.size {
                return Some(self.head);
            }
            return (bytes <= oldest.start).then_some(0);
        }
        // Wrapped, or full where the two are the same.
        (self.head + bytes <= oldest.start).then_some(self.head)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// No run overlaps one whose event has not passed, none lies outside, and there is always room in the end.
        #[test]
        fn runs_in_use_never_overlap(sizes in prop::collection::vec(1_usize..2049, 1..200), slots in 16_usize..40) {
            let mut ring = Ring::new(slots * ALIGNED);
            let mut live: VecDeque<(usize, Range<usize>)> = VecDeque::new();
            for (number, bytes) in sizes.into_iter().enumerate() {
                let bytes = bytes.min(ring.run_max());
                let run = ring
                    .room(bytes, |event| {
                        // Oldest first.
                        assert_eq!(live.pop_front().map(|(number, _)| number), Some(event));
                        Ok::<(), Infallible>(())
                    })
                    .unwrap();
                prop_assert_eq!(run.len(), bytes);
                prop_assert!(run.end <= slots * ALIGNED);
                for (_, other) in &live {
                    prop_assert!(run.end <= other.start || other.end <= run.start, "{:?} in {:?}", run, other);
                }
                live.push_back((number, run.clone()));
                ring.put(run, number);
            }
            let left: Vec<usize> = ring.drain().collect();
            prop_assert_eq!(left, live.into_iter().map(|(number, _)| number).collect::<Vec<_>>());
        }
    }

    #[test]
    fn small_writes_do_not_wait_while_there_is_room() {
        let mut ring = Ring::new(16 * ALIGNED);
        for number in 0..16 {
            let run = ring.room(ALIGNED, |_| Err(())).unwrap();
            ring.put(run, number);
        }
        assert_eq!(ring.room(1, Err), Err(0));
    }
}
