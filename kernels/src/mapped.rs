//! Files mapped read-only into memory. It lives here because mapping needs `unsafe`; the interface is safe.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::{Advice, Mmap, MmapOptions, UncheckedAdvice};

/// A file's bytes, mapped privately and read-only. Pages are read when they are first touched and belong to the page cache,
/// so several processes serving one model share them.
///
/// Weights belong to the administrator: whoever can write the file while it is served can change or crash the process, as
/// with a program's own executable. Replace a model by renaming a new file over the old one, never in place.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    /// Maps a whole regular file.
    ///
    /// # Errors
    /// What opening or mapping says; an empty file or something other than a regular file is `InvalidInput`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() == 0 {
            let what = if metadata.is_file() { "is empty" } else { "is not a regular file" };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        // SAFETY: the mapping is private and read-only and its length is the file's. That nobody truncates or rewrites the
        // file while it is mapped is the documented duty of the administrator whose model it is.
        let map = unsafe { MmapOptions::new().map(&file)? };
        Ok(Self { map })
    }

    /// Asks the system to read these bytes ahead. A hint: failure is ignored.
    pub fn advise_needed(&self, range: Range<usize>) {
        if let Some(length) = self.clamp(&range) {
            let _ = self.map.advise_range(Advice::WillNeed, range.start, length);
        }
    }

    /// Tells the system that whole pages of these bytes need not stay resident in this process; they are read again from
    /// the file when touched. A hint: failure is ignored.
    pub fn advise_unneeded(&self, range: Range<usize>) {
        let page = page_size();
        // Shrunk to whole pages: the bytes beside them may belong to a tensor that stays in use.
        let start = range.start.next_multiple_of(page);
        let end = range.end.min(self.map.len()) / page * page;
        if start < end {
            // SAFETY: the map is file-backed, private and never written, so a dropped page comes back from the file with
            // the same bytes; no reference into the map is invalidated.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }

    fn clamp(&self, range: &Range<usize>) -> Option<usize> {
        range.end.min(self.map.len()).checked_sub(range.start).filter(|length| *length > 0)
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf reads a constant of the system and has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(1 << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_after_their_pages_were_given_back() {
        let path = std::env::temp_dir().join(format!("openlora-mapped-{}", std::process::id()));
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i * 7) as u8).collect();
        std::fs::write(&path, &bytes).expect("write");
        let file = MappedFile::open(&path).expect("map");
        std::fs::remove_file(&path).expect("remove");
        assert_eq!(file.as_ref(), bytes);
        file.advise_unneeded(10..100_000);
        file.advise_unneeded(99_999..1_000_000);
        file.advise_needed(0..200_000);
        file.advise_needed(300_000..400_000);
        assert_eq!(file.as_ref(), bytes);
    }

    #[test]
    fn empty_files_and_folders_are_refused() {
        assert_eq!(MappedFile::open(&std::env::temp_dir()).expect_err("folder").kind(), io::ErrorKind::InvalidInput);
        let path = std::env::temp_dir().join(format!("openlora-empty-{}", std::process::id()));
        std::fs::write(&path, b"").expect("write");
        let error = MappedFile::open(&path).expect_err("empty");
        std::fs::remove_file(&path).expect("remove");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
