//! Traffic between two namespaces, measured for a moment.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use flannel_testkit::netns::Ns;

/// How long one measurement takes.
const TIME: Duration = Duration::from_millis(300);
/// The payload of a datagram, in bytes: it fits every MTU that is measured.
const DATAGRAM: usize = 1_400;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One TCP connection, as much as it takes.
    Stream,
    /// UDP datagrams of 1,400 bytes, as many as arrive.
    Datagrams,
    /// One byte there and back over TCP, one after the other.
    RoundTrips,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Stream, Self::Datagrams, Self::RoundTrips];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Stream => "one TCP stream",
            Self::Datagrams => "UDP datagrams of 1,400 bytes",
            Self::RoundTrips => "TCP round trips of one byte",
        }
    }

    /// A measurement with its unit.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Stream => format!("{:.1} Gbit/s", value * 8.0 / 1e9),
            Self::Datagrams | Self::RoundTrips => format!("{:.0} thousand/s", value / 1e3),
        }
    }
}

/// Sends from one namespace to an address in another; answers what arrived in a second: bytes of
/// the stream, datagrams, round trips.
pub(crate) fn measure(kind: Kind, from: &Ns, to: &Ns, ip: IpAddr) -> f64 {
    match kind {
        Kind::Stream => tcp(from, to, ip, receive_all, send_all),
        Kind::RoundTrips => tcp(from, to, ip, echo, ping_pong),
        Kind::Datagrams => datagrams(from, to, ip),
    }
}

fn bind<T: Send>(ns: &Ns, open: impl FnOnce() -> io::Result<T> + Send) -> T {
    let socket = ns.run(open).expect("it can be entered");
    socket.expect("a socket")
}

/// The rate that one side of a connection answers.
fn tcp(
    from: &Ns,
    to: &Ns,
    ip: IpAddr,
    far: fn(TcpStream) -> io::Result<Option<f64>>,
    near: fn(TcpStream) -> io::Result<Option<f64>>,
) -> f64 {
    let listener = bind(to, || TcpListener::bind((ip, 0)));
    let address = listener.local_addr().expect("bound");
    let server = thread::spawn(move || far(listener.accept()?.0));
    let client = bind(from, || TcpStream::connect(address));
    let near = near(client).expect("it can be sent");
    let far = server.join().expect("no panic").expect("it arrives");
    near.or(far).expect("one side counts")
}

fn send_all(mut stream: TcpStream) -> io::Result<Option<f64>> {
    let chunk = vec![0; 256 * 1024];
    let start = Instant::now();
    while start.elapsed() < TIME {
        stream.write_all(&chunk)?;
    }
    Ok(None)
}

fn receive_all(mut stream: TcpStream) -> io::Result<Option<f64>> {
    let mut buffer = vec![0; 256 * 1024];
    let (start, mut bytes) = (Instant::now(), 0_u64);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(Some(rate(bytes, start))),
            len => bytes += len as u64,
        }
    }
}

fn ping_pong(mut stream: TcpStream) -> io::Result<Option<f64>> {
    stream.set_nodelay(true)?;
    let (start, mut trips) = (Instant::now(), 0_u64);
    while start.elapsed() < TIME {
        stream.write_all(&[0])?;
        stream.read_exact(&mut [0])?;
        trips += 1;
    }
    Ok(Some(rate(trips, start)))
}

fn echo(mut stream: TcpStream) -> io::Result<Option<f64>> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(None)
}

fn rate(count: u64, start: Instant) -> f64 {
    count as f64 / start.elapsed().as_secs_f64()
}

fn datagrams(from: &Ns, to: &Ns, ip: IpAddr) -> f64 {
    let receiver = bind(to, || UdpSocket::bind((ip, 0)));
    let address: SocketAddr = receiver.local_addr().expect("bound");
    // Longer than any pause of the sender: then it is over.
    let over = Duration::from_millis(200);
    receiver.set_read_timeout(Some(over)).expect("not zero");
    let counting = thread::spawn(move || {
        let mut buffer = [0; DATAGRAM];
        let (mut first, mut last, mut count) = (None, Instant::now(), 0_u64);
        loop {
            match receiver.recv(&mut buffer) {
                Ok(_) => {
                    last = Instant::now();
                    first.get_or_insert(last);
                    count += 1;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock && count == 0 => {}
                Err(_) => break,
            }
        }
        let time = last - first.unwrap_or(last);
        count as f64 / time.as_secs_f64()
    });
    let sender = bind(from, || UdpSocket::bind("0.0.0.0:0"));
    let start = Instant::now();
    while start.elapsed() < TIME {
        // What does not fit the queue is not sent, and does not count.
        sender.send_to(&[0; DATAGRAM], address).ok();
    }
    counting.join().expect("no panic")
}
