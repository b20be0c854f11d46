//! An [`OverlayEvent`] as one line for people: whatever a store, a peer or the kernel put into it,
//! it stays one line, shows what is in it, and has an end.

use std::fmt::{self, Write};

use super::OverlayEvent;
use crate::family::DualStack;
use crate::kernel::Op;
use crate::lease_set::HeldReason;
use crate::reconcile::plan::{Step, Why};
use crate::subnet::Subnet;

/// The longest line, in characters. A line about what is usual has less than 200.
const LONGEST: usize = 2000;

impl fmt::Display for OverlayEvent {
    /// One line. Control characters and those that turn the direction of text are written as
    /// `\u{…}`; of a line of more than 2,000 characters it is said how many are left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = Line {
            out: f,
            written: 0,
            left_out: 0,
        };
        line.event(self)?;
        line.end()
    }
}

/// A line that is being written.
struct Line<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    written: usize,
    left_out: usize,
}

impl Line<'_, '_> {
    fn event(&mut self, event: &OverlayEvent) -> fmt::Result {
        match event {
            OverlayEvent::LeaseAcquired { subnet } => {
                self.write_str("lease acquired: ")?;
                self.subnets(subnet)
            }
            OverlayEvent::LeaseRenewed => self.write_str("lease renewed"),
            OverlayEvent::LeaseLost { reason } => write!(self, "lease lost: {reason}"),
            OverlayEvent::PeerAdded { key, node, subnet } => {
                write!(self, "peer added: {node} by record {key}, ")?;
                self.subnets(subnet)
            }
            OverlayEvent::PeerChanged { key, node, subnet } => {
                write!(self, "peer changed: {node} by record {key}, ")?;
                self.subnets(subnet)
            }
            OverlayEvent::PeerRemoved { key } => write!(self, "peer removed: record {key}"),
            OverlayEvent::Step { step, repair } => {
                self.write_str(if *repair { "repair: " } else { "step: " })?;
                self.step(step)
            }
            OverlayEvent::StepFailed { step, error } => {
                self.write_str("step failed: ")?;
                self.step(step)?;
                write!(self, ": {error}")
            }
            OverlayEvent::Condition(condition) => {
                write!(self, "condition: {condition}")?;
                match condition.message.as_str() {
                    "" => Ok(()),
                    message => write!(self, ": {message}"),
                }
            }
            OverlayEvent::InterfaceChanged { from, to, why } => {
                write!(self, "interface changed: {from} to {to}: {why}")
            }
            OverlayEvent::ConfigApplied => self.write_str("config applied"),
            OverlayEvent::WithdrawalHeld {
                withdrawn,
                known,
                reason,
            } => {
                let why = match reason {
                    HeldReason::Share => "a second reading decides",
                    HeldReason::NoConfig => "it has no network config",
                };
                write!(
                    self,
                    "withdrawal held: the store lacks {withdrawn} of {known} known peers: {why}"
                )
            }
        }
    }

    fn subnets(&mut self, subnet: &DualStack<Subnet>) -> fmt::Result {
        match subnet.is_empty() {
            true => self.write_str("no subnet"),
            false => write!(self, "{subnet}"),
        }
    }

    fn step(&mut self, step: &Step) -> fmt::Result {
        match &step.op {
            // What differs is in the reason, and what goes needs no description.
            Op::Create(object) | Op::Change(object) => write!(self, "{} {object}", step.op.verb())?,
            Op::Delete(object) => write!(self, "{} {}", step.op.verb(), object.key())?,
        }
        match &step.why {
            Why::Missing => self.write_str(" (missing)")?,
            Why::Drifted { field } => write!(self, " (drifted: {field})")?,
            Why::Orphan => self.write_str(" (not wanted any more)")?,
            Why::Rebuild { field } => write!(self, " (made anew: {field})")?,
            Why::InTheWay { of } => write!(self, " (in the way of {of})")?,
            Why::Stopgap { of } => write!(self, " (for the moment, for {of})")?,
        }
        if let Some(peer) = &step.peer {
            write!(self, " for record {peer}")?;
        }
        match step.disrupts.len() {
            0 => Ok(()),
            n => write!(self, ", which takes {n} objects with it"),
        }
    }

    fn end(self) -> fmt::Result {
        match self.left_out {
            0 => Ok(()),
            n => write!(self.out, "… ({n} more characters)"),
        }
    }
}

impl Write for Line<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if self.written >= LONGEST {
                self.left_out += 1;
                continue;
            }
            self.written += 1;
            match is_plain(c) {
                true => self.out.write_char(c)?,
                false => write!(self.out, "{}", c.escape_unicode())?,
            }
        }
        Ok(())
    }
}

/// Tells if a terminal and a log show the character in its place: neither a line's end, nor a
/// command to the terminal, nor a turn of the text's direction (Unicode's `Bidi_Control`).
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(
            c,
            '\u{61c}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'
                | '\u{2029}'
                | '\u{202a}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}'
        )
}
