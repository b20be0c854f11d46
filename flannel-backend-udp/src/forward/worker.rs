//! One thread of a worker: waits, forwards a batch in each direction, waits.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use flannel_core::Family;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::clock::Clock;
use super::inbound::Inbound;
use super::io::{Failure, Io, View};
use super::load::Usage;
use super::outbound::{Outbound, Progress};
use super::share::{LOOK_MS, Scale, Share};
use super::slot::Reader;
use super::wake::Wake;
use crate::counters::Shard;

/// Batches in a row before the other direction and the control plane are looked at again.
const ROUNDS: usize = 8;

/// Which way a thread forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Both,
    Outbound,
    Inbound,
    /// Both, but what comes in is left to the helper while one thread is not enough.
    Lead,
    /// What comes in, while its lead has left it that.
    Helper,
}

impl Direction {
    const fn is_outbound(self) -> bool {
        !matches!(self, Self::Inbound | Self::Helper)
    }

    const fn is_inbound(self) -> bool {
        !matches!(self, Self::Outbound)
    }
}

/// What a thread works with.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) direction: Direction,
    pub(crate) io: Reader<Io>,
    pub(crate) view: Reader<View>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) shard: Arc<Shard>,
    pub(crate) icmp_rate: u32,
    pub(crate) clock: Clock,
    /// What comes in, for a lead and its helper.
    pub(crate) share: Arc<Share>,
    pub(crate) scale: Scale,
    #[cfg(test)]
    pub(crate) fault: Arc<std::sync::atomic::AtomicU8>,
}

impl Thread {
    /// Forwards until it is stopped or cannot go on.
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        let mut outbound = self
            .direction
            .is_outbound()
            .then(|| Outbound::new(self.icmp_rate));
        let mut inbound = self
            .direction
            .is_inbound()
            .then(|| Inbound::new(self.io.value()));
        if let Some(outbound) = &mut outbound {
            outbound.set_io(self.io.value());
        }
        loop {
            if self.wake.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            if self.io.refresh() {
                if let Some(outbound) = &mut outbound {
                    outbound.set_io(self.io.value());
                }
                if let Some(inbound) = &mut inbound {
                    inbound.set_io(self.io.value());
                }
            }
            self.weigh();
            let mut ready = self.wait()?;
            for _ in 0..ROUNDS {
                if !ready.any() {
                    break;
                }
                if self.view.refresh() {
                    if let Some(outbound) = &mut outbound {
                        outbound.forget_peers();
                    }
                    if let Some(inbound) = &mut inbound {
                        inbound.forget_peers();
                    }
                }
                self.forward(&mut ready, outbound.as_mut(), inbound.as_mut())?;
            }
        }
    }

    fn forward(
        &self,
        ready: &mut Ready,
        outbound: Option<&mut Outbound>,
        inbound: Option<&mut Inbound>,
    ) -> Result<(), Failure> {
        let (io, view) = (self.io.value(), self.view.value());
        if let (true, Some(outbound)) = (ready.queue, outbound) {
            let now = self.clock.now();
            ready.queue = outbound.run(io, view, &self.shard, now)? == Progress::More;
        }
        let Some(inbound) = inbound else {
            return Ok(());
        };
        for (family, ready) in [(Family::V4, &mut ready.v4), (Family::V6, &mut ready.v6)] {
            if let (true, Some(socket)) = (*ready, io.socket(family)) {
                *ready = inbound.run(socket, io, view, &self.shard)? == Progress::More;
            }
        }
        Ok(())
    }

    /// A lead that has more to do than one thread can leaves what comes in to its helper; a helper
    /// gives back what one thread can do. Each has written what it received before the other receives
    /// more, so the order of packets stays.
    fn weigh(&mut self) {
        let now = self.clock.now();
        let (share, scale) = (&self.share, &mut self.scale);
        let usage = Usage::of_this_thread;
        match self.direction {
            Direction::Lead => {
                let is_to_lend = scale.is_to_lend(share, now, usage);
                if is_to_lend || scale.is_restless(share, &self.shard) {
                    share.lend();
                }
            }
            Direction::Helper => {
                let is_to_give_back = scale.is_to_give_back(share, now, usage);
                if is_to_give_back || scale.is_restless(share, &self.shard) {
                    share.give_back();
                }
            }
            _ => {}
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Result<Ready, Failure> {
        let io = self.io.value();
        let event = || PollFd::new(self.wake.event.as_fd(), PollFlags::POLLIN);
        let mut fds = [event(), event(), event(), event()];
        let mut count = 1;
        let mut places = [None; 3];
        if self.direction.is_outbound() {
            fds[count] = PollFd::new(io.queue(), PollFlags::POLLIN);
            places[0] = Some(count);
            count += 1;
        }
        let takes_inbound = match self.direction {
            Direction::Lead => !self.share.is_lent(),
            Direction::Helper => self.share.is_lent(),
            other => other.is_inbound(),
        };
        if takes_inbound {
            for (place, family) in [(1, Family::V4), (2, Family::V6)] {
                if let Some(socket) = io.socket(family) {
                    fds[count] = PollFd::new(socket.fd.as_fd(), PollFlags::POLLIN);
                    places[place] = Some(count);
                    count += 1;
                }
            }
        }
        let timeout = match self.direction {
            Direction::Helper if takes_inbound => PollTimeout::from(LOOK_MS),
            _ => PollTimeout::NONE,
        };
        match poll(&mut fds[..count], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Failure::socket(&error.into())),
        }
        let state = |place: Option<usize>| {
            place
                .and_then(|place| fds[place].revents())
                .unwrap_or(PollFlags::empty())
        };
        if !state(Some(0)).is_empty() {
            let _ = self.wake.event.read();
            #[cfg(test)]
            match self.fault.swap(0, Ordering::AcqRel) {
                0 => {}
                1 => panic!("a fault of a test"),
                _ => return Err(Failure::socket(&std::io::Error::other("a fault of a test"))),
            }
        }
        if state(places[0]).contains(PollFlags::POLLERR) {
            return Err(Failure::device(&std::io::Error::from_raw_os_error(
                libc::EBADFD,
            )));
        }
        Ok(Ready {
            queue: !state(places[0]).is_empty(),
            v4: !state(places[1]).is_empty(),
            v6: !state(places[2]).is_empty(),
        })
    }
}

/// Where something waits.
#[derive(Debug, Clone, Copy)]
struct Ready {
    queue: bool,
    v4: bool,
    v6: bool,
}

impl Ready {
    const fn any(self) -> bool {
        self.queue || self.v4 || self.v6
    }
}
