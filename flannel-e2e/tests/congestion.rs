//! The congestion control that the benchmark of the packet path gives its streams.
#![allow(missing_docs, reason = "tests")]

use std::io;
use std::net::{TcpListener, TcpStream};

use flannel_testkit::netns::Lab;
use nix::sys::socket::{getsockopt, sockopt};

#[allow(dead_code, reason = "the benchmark's own")]
#[path = "../benches/datapath/congestion.rs"]
mod congestion;

use congestion::Congestion;

/// `tcp_allowed_congestion_control` says what a namespace may begin with, not what we may choose.
#[test]
fn a_stream_goes_by_what_the_kernel_has_whatever_the_machine_lets_others_choose() {
    let Some(lab) = Lab::for_test("congestion") else {
        return;
    };
    let ns = lab.namespace("node").expect("a namespace");
    ns.set_up("lo").expect("up");
    let stream = ns.run(|| {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        TcpStream::connect(listener.local_addr()?)
    });
    let stream = stream.expect("the namespace").expect("a connection");
    for congestion in [Congestion::Cubic, Congestion::Bbr] {
        let name = congestion.name();
        match congestion.set(&stream) {
            Ok(()) => {
                let found = getsockopt(&stream, sockopt::TcpCongestion).expect("it is told");
                assert_eq!(found.to_string_lossy().trim_end_matches('\0'), name);
            }
            // This kernel was built without it, and that is what is said.
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::NotFound, "{name}: {error}");
                assert!(congestion.check().is_err(), "{name}");
            }
        }
    }
}
