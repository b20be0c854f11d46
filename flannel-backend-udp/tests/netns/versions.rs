//! Handovers between programs of different versions, and of different users.

use std::io::{ErrorKind, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use flannel_backend_udp::{
    Forwarder, Forwarders, HandoverError, InNamespace, Options, PacketPath, Versions,
};
use flannel_core::Family;

use crate::bed::{Bed, DEVICE, output, wait_until};

const READY: u8 = 1;
const GO: u8 = 2;
const RUNNING: u8 = 3;
const ASK: u8 = 5;
const END: u8 = 6;
const ENDED: u8 = 7;

/// The head of an offer without descriptors.
fn head(version: u16, lowest: u8, highest: u8, body: &[u8]) -> Vec<u8> {
    let mut head = b"FLNUDP".to_vec();
    head.extend(version.to_be_bytes());
    head.extend([0, 0, lowest, highest]);
    head.extend((body.len() as u32).to_be_bytes());
    head.extend(body);
    head
}

fn hear<const N: usize>(mut stream: &UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).expect("it is said");
    bytes
}

fn say(mut stream: &UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).expect("it is heard");
}

/// Reads an offer as it stands; answers its version and the versions that its sender writes. The
/// descriptors are let go.
fn hear_offer(mut stream: &UnixStream) -> (u16, [u8; 2]) {
    let head: [u8; 16] = hear(stream);
    assert_eq!(head[..6], *b"FLNUDP");
    let len = u32::from_be_bytes(head[12..].try_into().expect("four"));
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).expect("a body");
    (u16::from_be_bytes([head[6], head[7]]), [head[10], head[11]])
}

fn take_over(stream: &UnixStream) -> Result<Forwarder, HandoverError> {
    let sockets = Arc::new(InNamespace::current());
    Forwarder::take_over(stream, sockets, Arc::new(|_| {}))
}

#[test]
fn a_newer_program_is_asked_for_a_version_that_both_know() {
    let Some(bed) = Bed::new("udp-newer", 2, Family::V4) else {
        return;
    };
    let forwarder = bed.start(0, Options::default());
    let _other = bed.start(1, Options::default());
    bed.assert_reachable();
    let (old, new) = UnixStream::pair().expect("a pair");
    let sockets = bed.sockets(0);
    let taking = thread::spawn(move || Forwarder::take_over(&new, sockets, Arc::new(|_| {})));
    // A program of the future: its own version first, and then what it is asked for.
    say(&old, &head(9, 2, 9, b"not JSON any more"));
    assert_eq!(hear(&old), [ASK, 0, 2]);
    forwarder
        .hand_over(&old)
        .map_err(|(_, error)| error)
        .expect("it is taken");
    let _taken = taking.join().expect("no panic").expect("taken over");
    bed.assert_reachable();
}

#[test]
fn an_older_program_is_given_the_version_that_it_asks_for() {
    let Some(bed) = Bed::new("udp-older", 2, Family::V4) else {
        return;
    };
    let mut forwarder = bed.start(0, Options::default());
    let _other = bed.start(1, Options::default());
    bed.assert_reachable();
    // A version that was never offered, and one that is asked for again and again.
    for asked in [vec![[ASK, 0, 1]], vec![[ASK, 0, 9]], vec![[ASK, 0, 2]; 2]] {
        let (old, new) = UnixStream::pair().expect("a pair");
        let taking = thread::spawn(move || {
            for word in asked {
                hear_offer(&new);
                say(&new, &word);
            }
            new
        });
        let Err((back, error)) = forwarder.hand_over(&old) else {
            panic!("nobody took it");
        };
        assert!(matches!(error, HandoverError::Offer { .. }), "{error:?}");
        drop(taking.join().expect("no panic"));
        forwarder = back;
        bed.assert_reachable();
    }
    let _taken = bed.hand_over_after(0, forwarder, |new| {
        assert_eq!(hear_offer(new), (2, [2, 2]));
        say(new, &[ASK, 0, 2]);
    });
    bed.assert_reachable();
}

#[test]
fn whoever_shares_no_version_is_told_of_and_ends_what_it_has_if_it_is_asked() {
    // Older than the words, older, and newer.
    for (version, lowest, highest) in [(1, 0, 0), (1, 1, 1), (7, 3, 7)] {
        let (old, new) = UnixStream::pair().expect("a pair");
        say(&old, &head(version, lowest, highest, b"whatever it says"));
        let error = take_over(&new).expect_err("there is no common version");
        let HandoverError::Version { theirs } = error else {
            panic!("{error:?}");
        };
        assert!(theirs.has(version) && !theirs.has(2), "{theirs}");
        assert_eq!(theirs.common(Versions::OURS), None);
        let knows_the_word = highest > 0;
        let ending = thread::spawn(move || {
            assert_eq!(hear(&old), [END]);
            if knows_the_word {
                say(&old, &[ENDED]);
            }
        });
        let ended = Forwarders::dismiss(&new);
        ending.join().expect("no panic");
        assert_eq!(ended.is_ok(), knows_the_word, "{ended:?}");
    }
}

/// Nobody who is started is kept from it by what another one holds.
#[test]
fn a_packet_path_that_is_dismissed_leaves_device_and_port_free() {
    let Some(bed) = Bed::new("udp-dismissed", 2, Family::V4) else {
        return;
    };
    let paths = Forwarders::new(Options::default(), bed.sockets(0));
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().expect("a runtime");
    runtime
        .block_on(paths.open(&bed.tunnel(0)))
        .expect("it opens");
    let (old, new) = UnixStream::pair().expect("a pair");
    let asking = thread::spawn(move || {
        hear_offer(&new);
        Forwarders::dismiss(&new)
    });
    let dev = DEVICE.parse().expect("a name");
    paths.hand_over(dev, &old).expect("it gives way");
    asking.join().expect("no panic").expect("it has ended");
    assert_eq!(paths.running(), []);
    assert!(!output(bed.ns(0), "ip", &["link", "show", DEVICE]).0);
    bed.add_device(0);
    let _mine = bed.start(0, Options::default());
    let _other = bed.start(1, Options::default());
    bed.assert_reachable();
}

/// A word of this conversation where another one is due ends it, and harms nobody.
#[test]
fn words_out_of_turn_leave_the_old_one_running() {
    let Some(bed) = Bed::new("udp-turn", 2, Family::V4) else {
        return;
    };
    let mut forwarder = bed.start(0, Options::default());
    for words in [&[ENDED][..], &[RUNNING], &[GO], &[READY, END], &[ASK, 0]] {
        let (old, new) = UnixStream::pair().expect("a pair");
        let taking = thread::spawn(move || {
            hear_offer(&new);
            say(&new, words);
        });
        let Err((back, _)) = forwarder.hand_over(&old) else {
            panic!("nobody took it: {words:?}");
        };
        taking.join().expect("no panic");
        forwarder = back;
        wait_until("it runs", || forwarder.health().is_running);
    }
}

/// Where the other user's process finds us.
const MEET: &str = "FLANNEL_TEST_MEET";

#[test]
fn nothing_is_given_to_and_nothing_taken_from_another_user() {
    let Some(bed) = Bed::new("udp-stranger", 1, Family::V4) else {
        return;
    };
    let forwarder = bed.start(0, Options::default());
    let name = format!("flannel-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("a socket");
    #[allow(clippy::disallowed_methods, reason = "another user's process")]
    let mut other = Command::new("/proc/self/exe")
        .args(["--exact", "versions::another_user"])
        .env(MEET, &name)
        .uid(65_534)
        .spawn()
        .expect("it starts");
    let (stream, _) = listener.accept().expect("it comes");
    let Err((_forwarder, error)) = forwarder.hand_over(&stream) else {
        panic!("it was given away");
    };
    let is_told = |error: &HandoverError| matches!(error, HandoverError::Stranger { uid: 65_534 });
    assert!(is_told(&error), "{error:?}");
    let error = take_over(&stream).expect_err("it is another user's");
    assert!(is_told(&error), "{error:?}");
    let error = Forwarders::dismiss(&stream).expect_err("it is another user's");
    assert!(is_told(&error), "{error:?}");
    // Nothing was said to it, and it says so.
    drop(stream);
    assert!(other.wait().expect("it ends").success());
}

/// The other user's process: not a test of its own.
#[test]
#[allow(
    clippy::disallowed_methods,
    reason = "what a test is told by the one that starts it"
)]
fn another_user() {
    let Ok(name) = std::env::var(MEET) else {
        return;
    };
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let mut stream = UnixStream::connect_addr(&address).expect("it listens");
    // A good offer, if anybody took it. All may have been refused by now.
    if let Err(error) = stream.write_all(&head(2, 2, 2, b"{}")) {
        assert_eq!(error.kind(), ErrorKind::BrokenPipe, "{error}");
    }
    let mut heard = Vec::new();
    match stream.read_to_end(&mut heard) {
        Ok(_) => {}
        // What it had said was not read.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    assert_eq!(heard, [0; 0]);
}
