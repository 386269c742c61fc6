//! Watches the frames of an HTTP/2 connection and ends it when the peer floods it with control frames.
//!
//! h2 answers every PING and SETTINGS, so a peer that sends nothing else costs us time and gains nothing (CVE-2019-9512
//! and 9515); h2 bounds resets, CONTINUATION and empty DATA by itself, but not these. Peers legitimately send a PING for
//! each DATA frame they read (grpc-go estimates bandwidth so), so each HEADERS or DATA frame we send earns credit, as in
//! gRPC's own "too many pings" rule.
//!
//! On a flood the reader is handed a frame that the specification forbids (RFC 9113 section 6.7: a PING on a stream),
//! after which h2 itself sends GOAWAY and closes. So no second party ever writes to the connection.

use std::time::Instant;

/// What the client sends first, RFC 9113 section 3.4.
const PREFACE_LEN: usize = 24;
const HEADER_LEN: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// Eight bytes of PING on stream 1.
pub(crate) const FORBIDDEN_FRAME: [u8; 17] = [0, 0, 8, 6, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];

/// Finds frame headers in a byte stream that arrives in any pieces.
#[derive(Debug)]
struct Frames {
    header: [u8; HEADER_LEN],
    header_len: usize,
    /// Bytes until the next header: preface or payload.
    skip: usize,
}

impl Frames {
    fn after(skip: usize) -> Self {
        Self { header: [0; HEADER_LEN], header_len: 0, skip }
    }

    /// Consumes up to one frame header of `bytes`: how many bytes, and the frame's type where a header was completed.
    fn advance(&mut self, bytes: &[u8]) -> (usize, Option<u8>) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        let rest = &bytes[skipped..];
        let taken = (HEADER_LEN - self.header_len).min(rest.len());
        self.header[self.header_len..self.header_len + taken].copy_from_slice(&rest[..taken]);
        self.header_len += taken;
        if self.header_len < HEADER_LEN {
            return (skipped + taken, None);
        }
        self.header_len = 0;
        self.skip = u32::from_be_bytes([0, self.header[0], self.header[1], self.header[2]]) as usize;
        (skipped + taken, Some(self.header[3]))
    }
}

/// How many control frames a peer may send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) burst: u32,
    pub(crate) per_second: u32,
}

/// The state of one connection.
#[derive(Debug)]
pub(crate) struct FrameGuard {
    budget: Budget,
    credit: f64,
    refilled: Instant,
    received: Frames,
    sent: Frames,
    frames_seen: bool,
    /// A flood was seen; what remains is to let its last frame end.
    flooded: bool,
}

impl FrameGuard {
    pub(crate) fn new(budget: Budget) -> Self {
        Self {
            budget,
            credit: f64::from(budget.burst),
            refilled: Instant::now(),
            received: Frames::after(PREFACE_LEN),
            sent: Frames::after(0),
            frames_seen: false,
            flooded: false,
        }
    }

    /// Whether the peer has sent a frame: it speaks HTTP/2.
    pub(crate) fn frames_seen(&self) -> bool {
        self.frames_seen
    }

    /// Looks at bytes just read. `Some(n)`: a flood; only the first `n` bytes are the peer's last, whole frame, and
    /// [`FORBIDDEN_FRAME`] must follow them.
    pub(crate) fn read(&mut self, bytes: &[u8], now: Instant) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if self.flooded {
                return self.end_of_last_frame(at, bytes.len());
            }
            let (used, frame) = self.received.advance(&bytes[at..]);
            at += used;
            if let Some(kind) = frame {
                self.frames_seen = true;
                self.flooded = !self.affordable(kind, now);
            }
        }
        if self.flooded { self.end_of_last_frame(at, bytes.len()) } else { None }
    }

    /// Looks at bytes just written, all slices of a vectored write in order.
    pub(crate) fn wrote(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (used, frame) = self.sent.advance(bytes);
            bytes = &bytes[used..];
            if matches!(frame, Some(DATA | HEADERS)) {
                self.credit = (self.credit + 2.0).min(f64::from(self.budget.burst));
            }
        }
    }

    fn end_of_last_frame(&mut self, at: usize, len: usize) -> Option<usize> {
        let payload = self.received.skip.min(len - at);
        self.received.skip -= payload;
        (self.received.skip == 0).then_some(at + payload)
    }

    fn affordable(&mut self, kind: u8, now: Instant) -> bool {
        if matches!(kind, DATA | HEADERS | RST_STREAM | WINDOW_UPDATE | CONTINUATION) {
            return true;
        }
        let seconds = now.saturating_duration_since(self.refilled).as_secs_f64();
        let full = f64::from(self.budget.burst);
        self.credit = (self.credit + seconds * f64::from(self.budget.per_second)).min(full) - 1.0;
        self.refilled = now;
        self.credit >= 0.0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const BUDGET: Budget = Budget { burst: 10, per_second: 1 };

    fn frame(kind: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0, (len >> 8) as u8, len as u8, kind, 0, 0, 0, 0, 0];
        bytes.resize(HEADER_LEN + len, 0xAB);
        bytes
    }

    fn session(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![b'P'; PREFACE_LEN];
        frames.iter().for_each(|frame| bytes.extend(frame));
        bytes
    }

    #[test]
    fn a_flood_is_cut_after_a_whole_frame_however_the_bytes_arrive() {
        let bytes = session(&vec![frame(6, 8); 20]);
        let whole = PREFACE_LEN + 11 * (HEADER_LEN + 8);
        for piece in 1..=bytes.len() {
            let mut guard = FrameGuard::new(BUDGET);
            let now = guard.refilled;
            let mut delivered = 0;
            let mut cut = None;
            for part in bytes.chunks(piece) {
                cut = guard.read(part, now);
                delivered += cut.unwrap_or(part.len());
                if cut.is_some() {
                    break;
                }
            }
            assert!(cut.is_some(), "pieces of {piece}");
            assert_eq!(delivered, whole, "pieces of {piece}");
        }
    }

    #[test]
    fn requests_uploads_and_slow_pings_are_no_flood() {
        let mut guard = FrameGuard::new(BUDGET);
        let start = guard.refilled;
        let busy: Vec<_> = [HEADERS, DATA, CONTINUATION, WINDOW_UPDATE, RST_STREAM].map(|kind| frame(kind, 40)).into();
        assert_eq!(guard.read(&session(&vec![busy.concat(); 100]), start), None);
        for second in 0..1_000 {
            assert_eq!(guard.read(&frame(6, 8), start + Duration::from_secs(second)), None, "second {second}");
        }
    }

    #[test]
    fn a_ping_for_each_data_frame_we_send_is_no_flood() {
        let mut guard = FrameGuard::new(BUDGET);
        let now = guard.refilled;
        assert_eq!(guard.read(&session(&[]), now), None);
        for _ in 0..1_000 {
            guard.wrote(&frame(DATA, 30));
            assert_eq!(guard.read(&frame(6, 8), now), None);
        }
        for _ in 0..1_000 {
            guard.wrote(&frame(6, 8));
        }
        let flood: Vec<u8> = (0..20).flat_map(|_| frame(6, 8)).collect();
        assert!(guard.read(&flood, now).is_some(), "answers to pings earn nothing");
    }

    #[test]
    fn any_bytes_in_any_pieces_are_followed_without_a_panic() {
        bolero::check!().with_type::<(Vec<u8>, u8)>().for_each(|(bytes, piece)| {
            let mut guard = FrameGuard::new(BUDGET);
            let now = guard.refilled;
            for part in bytes.chunks(usize::from(*piece).max(1)) {
                guard.wrote(part);
                if let Some(end) = guard.read(part, now) {
                    assert!(end <= part.len());
                    break;
                }
            }
        });
    }
}
