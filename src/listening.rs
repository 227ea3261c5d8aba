//! Where this process listens: its sockets, and what to do where there can be none.

use std::io::{self, Error, ErrorKind};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// A bound, non-blocking socket; an address that was in use a moment ago may be used again.
///
/// # Errors
/// What the system says of the last address that the name has; see [`remedy`].
pub(crate) fn tcp(address: &str) -> io::Result<TcpListener> {
    let mut last = Error::from(ErrorKind::AddrNotAvailable);
    for at in address.to_socket_addrs()? {
        match bind(at) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn bind(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    // More than the greetings that run at once: callers wait here.
    socket.listen(256)?;
    Ok(socket.into())
}

/// A socket in the file system, non-blocking. One that a process left behind is removed; one that somebody listens on is not, and
/// nothing that is no socket.
///
/// # Errors
/// What the system says, or what is there; see [`remedy`].
pub(crate) fn unix(path: &str) -> io::Result<(UnixListener, SocketFile)> {
    match found_at(path)? {
        Found::NoSocket => return Err(no_socket()),
        Found::Left => std::fs::remove_file(path)?,
        // Of one that answers the system says so itself.
        Found::Nothing | Found::Answers => {}
    }
    let socket = UnixListener::bind(path)?;
    let file = SocketFile::of(path, &socket)?;
    // Who may enter its folder may connect, whatever the umask: clients usually run as somebody else.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    socket.set_nonblocking(true)?;
    Ok((socket, file))
}

/// What is at a socket's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing: a socket can be made there.
    Nothing,
    /// A socket that nobody listens on.
    Left,
    /// A socket that somebody listens on.
    Answers,
    /// A file, a folder or a link. Connecting to one is refused just as to a socket that was left behind.
    NoSocket,
}

/// Looks, and changes nothing.
///
/// # Errors
/// When it cannot be seen, or not be connected to.
pub(crate) fn found_at(path: &str) -> io::Result<Found> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => return Ok(Found::NoSocket),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Who listens there and accepts nobody is not waited for.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(Found::Answers),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Found::Answers),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(Found::Left),
        Err(error) => Err(error),
    }
}

/// Of [`Found::NoSocket`].
pub(crate) fn no_socket() -> Error {
    Error::new(ErrorKind::AlreadyExists, "a file is there that is no socket")
}

/// Whether this user may make a socket at this path, or put one in the place of another; makes none.
///
/// # Errors
/// What the system says of its folder.
pub(crate) fn can_make(path: &str) -> io::Result<()> {
    let folder = Path::new(path).parent().unwrap_or(Path::new("/"));
    if !std::fs::metadata(folder)?.is_dir() {
        return Err(ErrorKind::NotADirectory.into());
    }
    Ok(rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK)?)
}

/// The file of a socket, removed at the end, if it is still this socket's: another process may have put its own there.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
    /// As long as it is open its inode is nobody else's, and who looks whether the file was left behind finds that it was not.
    _socket: UnixListener,
}

impl SocketFile {
    fn of(path: &str, socket: &UnixListener) -> io::Result<SocketFile> {
        Ok(SocketFile {
            path: path.into(),
            id: id_of(Path::new(path))?,
            _socket: socket.try_clone()?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if id_of(&self.path).is_ok_and(|id| id == self.id) {
            // One that stays is taken over by the next process.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
fn id_of(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// What to do when `address` cannot be listened on.
pub(crate) fn remedy(address: &str, error: &Error) -> String {
    if let Some(path) = address.strip_prefix("unix:") {
        let folder = Path::new(path).parent().unwrap_or(Path::new("/")).display();
        return match error.kind() {
            ErrorKind::AlreadyExists => "it was left alone: move it away, or write another path".to_owned(),
            ErrorKind::AddrInUse => {
                format!("`ss -lxp src {path}` says who listens there: end that, or write another path")
            }
            ErrorKind::NotFound | ErrorKind::NotADirectory => {
                format!("make the folder {folder}, or write another path")
            }
            ErrorKind::PermissionDenied => {
                format!("let evrepl's user write in the folder {folder}, or write another path")
            }
            _ => "write another path".to_owned(),
        };
    }
    let port = address.rsplit_once(':').map_or(address, |(_, port)| port);
    match error.kind() {
        ErrorKind::AddrInUse => {
            format!("`ss -tanp 'sport = :{port}'` says who holds it: end that, or write another port")
        }
        ErrorKind::AddrNotAvailable => {
            "it is no address of this machine: write one that `ip address` shows, or every one (0.0.0.0)".to_owned()
        }
        ErrorKind::PermissionDenied => "let evrepl's user take it, or write a port from 1024 on".to_owned(),
        _ => "write an address of this machine, such as 127.0.0.1".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of its own, gone with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("evrepl-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            Folder(folder)
        }

        fn place(&self, name: &str) -> String {
            self.0.join(name).to_str().unwrap().to_owned()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// As a process that was killed leaves it.
    fn left_behind(path: &str) {
        drop(UnixListener::bind(path).unwrap());
    }

    #[test]
    fn a_socket_left_behind_is_taken_over_and_no_other_file_is_touched() {
        let folder = Folder::new("taken-over");
        let [left, file, link] = ["left", "file", "link"].map(|name| folder.place(name));
        left_behind(&left);
        assert_eq!(found_at(&left).unwrap(), Found::Left);
        let _taken = unix(&left).unwrap();
        // Somebody listens there.
        assert_eq!(found_at(&left).unwrap(), Found::Answers);
        assert_eq!(unix(&left).unwrap_err().kind(), ErrorKind::AddrInUse);
        std::fs::write(&file, "precious").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            assert_eq!(unix(path).unwrap_err().kind(), ErrorKind::AlreadyExists);
            assert_eq!(std::fs::read_to_string(path).unwrap(), "precious");
        }
    }

    #[test]
    fn one_that_accepts_nobody_is_not_waited_for() {
        let folder = Folder::new("full");
        let path = folder.place("socket");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        socket.listen(0).unwrap();
        for _ in 0..3 {
            assert_eq!(found_at(&path).unwrap(), Found::Answers);
        }
    }

    #[test]
    fn the_file_of_a_socket_goes_with_it_but_not_that_of_another() {
        let folder = Folder::new("ends");
        let path = folder.place("socket");
        let (socket, file) = unix(&path).unwrap();
        drop(socket);
        assert_eq!(found_at(&path).unwrap(), Found::Answers);
        drop(file);
        assert_eq!(found_at(&path).unwrap(), Found::Nothing);
        // Another process has removed the file, and has put its own there.
        let (_socket, file) = unix(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (_next, next_file) = unix(&path).unwrap();
        drop(file);
        assert_eq!(found_at(&path).unwrap(), Found::Answers);
        drop(next_file);
        assert_eq!(found_at(&path).unwrap(), Found::Nothing);
        // No socket any more.
        let (_socket, file) = unix(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(file);
        assert_eq!(found_at(&path).unwrap(), Found::NoSocket);
    }

    #[test]
    fn sockets_on_every_address_are_for_both_kinds_as_the_configuration_takes_it() {
        let v4 = tcp("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        assert_eq!(
            tcp(&format!("0.0.0.0:{port}")).unwrap_err().kind(),
            ErrorKind::AddrInUse
        );
        // Without IPv6 there is no such address at all.
        assert!(
            tcp(&format!("[::]:{port}")).is_err(),
            "`config::address` says otherwise"
        );
    }

    #[test]
    fn what_to_do_fits_what_is_wrong() {
        let folder = Folder::new("remedy");
        let file = folder.place("file");
        std::fs::write(&file, "").unwrap();
        let said = |address: &str| {
            let error = match address.strip_prefix("unix:") {
                Some(path) => unix(path).unwrap_err(),
                None => tcp(address).unwrap_err(),
            };
            format!("{error}; {}", remedy(address, &error))
        };
        let (held, taken) = (tcp("127.0.0.1:0").unwrap(), folder.place("taken"));
        let address = held.local_addr().unwrap().to_string();
        let _held = unix(&taken).unwrap();
        for (address, parts) in [
            (
                address.clone(),
                [
                    "in use",
                    &format!("ss -tanp 'sport = :{}'", held.local_addr().unwrap().port()),
                ],
            ),
            ("192.0.2.1:0".to_owned(), ["requested address", "`ip address`"]),
            (
                format!("unix:{file}"),
                ["a file is there that is no socket; it was left alone", "another path"],
            ),
            (format!("unix:{taken}"), ["in use", &format!("`ss -lxp src {taken}`")]),
            (
                format!("unix:{}/s", folder.place("none")),
                ["No such file", &format!("folder {}", folder.place("none"))],
            ),
        ] {
            let said = said(&address);
            assert!(parts.iter().all(|part| said.contains(part)), "{address}: {said}");
        }
    }
}
