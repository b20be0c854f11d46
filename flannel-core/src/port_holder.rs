//! [`udp_port_holder`]: who has a UDP port, so that a refusal names who is in the way.

use std::fs::{self, File};
use std::io::Read;

/// The most that is read of the list of sockets, in bytes: a line has some 130.
const LONGEST: u64 = 4 << 20;

/// The most processes that are looked at.
const PROCESSES: usize = 16_384;

/// Names who has a UDP port in the network namespace of the calling thread, in words; `None`:
/// nobody, or it cannot be told. Reads `/proc`: not for use where time matters.
pub fn udp_port_holder(port: u16) -> Option<String> {
    let lists = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"];
    let mut sockets = lists.iter().flat_map(|list| sockets_of(&read(list), port));
    let Socket { uid, inode } = sockets.next()?;
    if inode == 0 {
        return Some("a tunnel of the kernel's own".to_owned());
    }
    Some(process_of(inode).unwrap_or_else(|| format!("a process of user {uid}")))
}

/// A socket in the kernel's list.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    uid: u32,
    /// 0: no process holds it.
    inode: u64,
}

/// The sockets bound to a port (`/proc/net/udp`: after the slot the address with the port in
/// hexadecimal digits, then the other end, the state, three pairs of figures, user, timeout, inode).
fn sockets_of(list: &str, port: u16) -> Vec<Socket> {
    let socket = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (_, of) = fields.nth(1)?.rsplit_once(':')?;
        if u16::from_str_radix(of, 16).ok()? != port {
            return None;
        }
        Some(Socket {
            uid: fields.nth(5)?.parse().ok()?,
            inode: fields.nth(1)?.parse().ok()?,
        })
    };
    list.lines().skip(1).filter_map(socket).collect()
}

fn process_of(inode: u64) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten().take(PROCESSES);
    for process in processes {
        let pid = process.file_name();
        let Some(pid) = pid
            .to_str()
            .filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let mut targets = descriptors
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok());
        if targets.any(|target| target.as_os_str() == wanted.as_str()) {
            let name = read(&format!("/proc/{pid}/comm"));
            let name: String = name.trim().chars().filter(|c| !c.is_control()).collect();
            return Some(format!("process {pid} ({name})"));
        }
    }
    None
}

/// The beginning of a file; nothing if it cannot be read.
fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        file.take(LONGEST).read_to_end(&mut bytes).ok();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sockets_of_a_port_are_read_and_nothing_else() {
        let list = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  101: 00000000:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 2 0000000000000000 0
  102: 0100007F:205D 00000000:0000 07 00000000:00000000 00:00000000 00000000  1000        0 4711 2 0000000000000000 0
  103: 00000000:zz
";
        let found = |port| sockets_of(list, port);
        assert_eq!(found(8472), [Socket { uid: 0, inode: 0 }]);
        let (uid, inode) = (1000, 4711);
        assert_eq!(found(8285), [Socket { uid, inode }]);
        assert_eq!(found(1), []);
    }

    #[test]
    fn a_socket_of_ours_is_ours() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let port = socket.local_addr().expect("it is bound").port();
        let holder = udp_port_holder(port).expect("it is taken");
        let pid = std::process::id().to_string();
        assert!(holder.starts_with(&format!("process {pid} (")), "{holder}");
    }
}
