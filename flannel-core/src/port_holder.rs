//! [`udp_port_holder`], [`udp_address_holder`]: who has a UDP port, so that a refusal names who is in
//! the way.

use std::fs::{self, File};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The most that is read of the list of sockets, in bytes: a line has some 130.
const LONGEST: u64 = 4 << 20;

/// The most processes that are looked at.
const PROCESSES: usize = 16_384;

/// Names who has a UDP port in the network namespace of the calling thread, in words; `None`:
/// nobody, or it cannot be told. Reads `/proc`: not for use where time matters.
pub fn udp_port_holder(port: u16) -> Option<String> {
    holder(port, |_| true)
}

/// Names who keeps a socket from being bound to an address and port, as [`udp_port_holder`] does: one
/// who has the same port on another address is in nobody's way.
pub fn udp_address_holder(listen: SocketAddr) -> Option<String> {
    holder(listen.port(), |bound| is_in_the_way(bound, listen.ip()))
}

fn holder(port: u16, is_meant: impl Fn(IpAddr) -> bool) -> Option<String> {
    let lists = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"];
    let sockets = lists.iter().flat_map(|list| sockets_of(&read(list), port));
    let Socket { uid, inode, .. } = sockets.into_iter().find(|socket| is_meant(socket.bound))?;
    if inode == 0 {
        return Some("a tunnel of the kernel's own: see ip -d link".to_owned());
    }
    Some(process_of(inode).unwrap_or_else(|| format!("a process of user {uid}")))
}

/// A socket on all IPv6 addresses may take IPv4 as well; the list does not say whether it does.
fn is_in_the_way(bound: IpAddr, wanted: IpAddr) -> bool {
    let both = bound.is_ipv4() == wanted.is_ipv4();
    bound == wanted
        || both && (bound.is_unspecified() || wanted.is_unspecified())
        || bound == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        || wanted == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
}

/// A socket in the kernel's list.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    bound: IpAddr,
    uid: u32,
    /// 0: no process holds it.
    inode: u64,
}

/// The sockets bound to a port (`/proc/net/udp`: after the slot the address with the port in
/// hexadecimal digits, then the other end, the state, three pairs of figures, user, timeout, inode).
fn sockets_of(list: &str, port: u16) -> Vec<Socket> {
    let socket = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (bound, of) = fields.nth(1)?.rsplit_once(':')?;
        if u16::from_str_radix(of, 16).ok()? != port {
            return None;
        }
        Some(Socket {
            bound: address(bound)?,
            uid: fields.nth(5)?.parse().ok()?,
            inode: fields.nth(1)?.parse().ok()?,
        })
    };
    list.lines().skip(1).filter_map(socket).collect()
}

/// Reads an address: words of 32 bits in the order of this machine.
fn address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let digits = text.get(at..at + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    if text.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let words = [word(0)?, word(8)?, word(16)?, word(24)?];
    let bytes: [u8; 16] = words.concat().try_into().ok()?;
    Some(Ipv6Addr::from(bytes).into())
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
        let bound = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let (uid, inode) = (0, 0);
        assert_eq!(found(8472), [Socket { bound, uid, inode }]);
        // The file of a machine of the other order of bytes has 7F000001.
        let bound = IpAddr::from(0x0100_007F_u32.to_ne_bytes());
        let (uid, inode) = (1000, 4711);
        assert_eq!(found(8285), [Socket { bound, uid, inode }]);
        assert_eq!(found(1), []);
        let v6 = if cfg!(target_endian = "little") {
            "000080FE000000000000000001000000"
        } else {
            "FE800000000000000000000000000001"
        };
        assert_eq!(address(v6), "fe80::1".parse().ok());
    }

    #[test]
    fn only_who_is_in_the_way_of_an_address_is_named() {
        let is = |bound: &str, wanted: &str| {
            let [bound, wanted] = [bound, wanted].map(|ip| ip.parse().expect("an address"));
            is_in_the_way(bound, wanted)
        };
        for (bound, wanted) in [
            ("192.0.2.1", "192.0.2.1"),
            ("0.0.0.0", "192.0.2.1"),
            ("192.0.2.1", "0.0.0.0"),
            ("::", "192.0.2.1"),
            ("::", "2001:db8::1"),
        ] {
            assert!(is(bound, wanted), "{bound} {wanted}");
        }
        for (bound, wanted) in [
            ("127.0.0.1", "192.0.2.1"),
            ("0.0.0.0", "2001:db8::1"),
            ("2001:db8::1", "192.0.2.1"),
        ] {
            assert!(!is(bound, wanted), "{bound} {wanted}");
        }
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
