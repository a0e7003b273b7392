//! Reading files that somebody else puts in place, without ever waiting for whoever should write them.

use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What a regular file holds, up to `bytes_max` bytes and one more. A pipe, a device or a directory is an error at once:
/// to open or read one of them may wait for ever.
pub fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_no_file_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (pipe, link, text) = (dir.path().join("pipe"), dir.path().join("link"), dir.path().join("text"));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for target in ["/dev/zero", "/dev/null", "pipe", "/dev"] {
            let _before = std::fs::remove_file(&link);
            symlink(target, &link).unwrap();
            assert_eq!(read(&link, 10).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{target}");
        }
        assert_eq!(read(&pipe, 10).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        std::fs::write(&text, "0123456789").unwrap();
        assert_eq!(read(&text, 10).unwrap().len(), 10);
        assert_eq!(read(&text, 5).unwrap().len(), 6);
    }
}
