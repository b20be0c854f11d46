//! Look-ups of what the kernel would do with a packet (`RTM_GETROUTE`), and the rules of policy
//! routing (`linux/fib_rules.h`).

use std::collections::BTreeSet;
use std::net::IpAddr;

use flannel_core::{Family, Lookup, MAIN_TABLE, PolicyRule, Refused, Routed};
use nix::errno::Errno;

use crate::connection::{BATCH_REQUESTS, Connection};
use crate::error::Failure;
use crate::names::Names;
use crate::route::{RTM_GETROUTE, RTM_NEWROUTE, decode_via};
use crate::wire::{Attributes, Batch, Body, Malformed, field_u8, read_ip, read_u32};

pub(crate) const RTM_NEWRULE: u16 = 32;
pub(crate) const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;

/// The length of `struct rtmsg`, and of `struct fib_rule_hdr`.
const HEADER: usize = 12;

/// Asks what becomes of packets; `None`: the kernel cannot say.
///
/// Only the devices that are in the questions and answers are looked at: there may be many others.
pub(crate) fn ask(
    connection: &mut Connection,
    lookups: &[Lookup],
) -> Result<Vec<Option<Routed>>, Failure> {
    let mut names = Names::default();
    let inputs = lookups.iter().filter_map(|lookup| lookup.input);
    for dev in inputs.collect::<BTreeSet<_>>() {
        names.learn(connection, dev)?;
    }
    let mut answers = Vec::with_capacity(lookups.len());
    for lookups in lookups.chunks(BATCH_REQUESTS) {
        answers.extend(ask_batch(connection, lookups, &names)?);
    }
    let through = answers.iter().filter_map(|answer| match answer {
        Some(Answer::Through { index, .. }) => Some(*index),
        Some(Answer::Local | Answer::Refused(_)) | None => None,
    });
    for index in through.collect::<BTreeSet<_>>() {
        names.learn_index(connection, index)?;
    }
    let named = |answer| match answer {
        Answer::Local => Some(Routed::Local),
        Answer::Refused(why) => Some(Routed::Refused(why)),
        Answer::Through {
            index,
            gateway,
            table,
        } => Some(Routed::Through {
            dev: names.get(index)?,
            gateway,
            table,
        }),
    };
    Ok(answers.into_iter().map(|answer| named(answer?)).collect())
}

fn ask_batch(
    connection: &mut Connection,
    lookups: &[Lookup],
    names: &Names,
) -> Result<Vec<Option<Answer>>, Failure> {
    let mut batch = Batch::default();
    let mut places = Vec::new();
    for (place, lookup) in lookups.iter().enumerate() {
        let input = lookup.input.map(|dev| names.index(dev));
        // A device that is gone is no answer.
        if let Ok(input) = input.transpose() {
            batch.push(RTM_GETROUTE, 0, &question(lookup, input));
            places.push(place);
        }
    }
    let mut found = vec![None; places.len()];
    let results = connection.transact(&mut batch, |at, message| {
        if let (RTM_NEWROUTE, Some(slot)) = (message.kind, found.get_mut(at)) {
            *slot = answer(message.body)?;
        }
        Ok(())
    });
    let mut answers = vec![None; lookups.len()];
    for ((place, result), found) in places.into_iter().zip(results).zip(found) {
        let answer = match result {
            Ok(()) => found,
            // With words it is about the question.
            Err(Failure::Refused { text: Some(_), .. }) => None,
            Err(Failure::Refused { errno, text: None }) => refused(errno).map(Answer::Refused),
            Err(failure) => return Err(failure),
        };
        if let Some(slot) = answers.get_mut(place) {
            *slot = answer;
        }
    }
    Ok(answers)
}

/// The fate of a packet: the device by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Through {
        index: u32,
        gateway: Option<IpAddr>,
        table: u32,
    },
    Local,
    Refused(Refused),
}

/// The question what becomes of a packet.
pub(crate) fn question(lookup: &Lookup, input: Option<u32>) -> Body {
    const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    const RTA_DST: u16 = 1;
    const RTA_SRC: u16 = 2;
    const RTA_IIF: u16 = 3;
    let family = Family::of(&lookup.dst);
    // IPv6 names the table by itself, and takes the flag for a mistake.
    let (number, flags) = match family {
        Family::V4 => (AF_INET, RTM_F_LOOKUP_TABLE),
        Family::V6 => (AF_INET6, 0),
    };
    let bits = family.bits();
    let src = lookup.src.filter(|src| Family::of(src) == family);
    let src_len = src.map_or(0, |_| bits);
    let [a, b, c, d] = flags.to_ne_bytes();
    let mut body = Body::new(&[number, bits, src_len, 0, 0, 0, 0, 0, a, b, c, d]);
    body.ip(RTA_DST, lookup.dst);
    if let Some(src) = src {
        body.ip(RTA_SRC, src);
    }
    if let Some(index) = input {
        body.attribute(RTA_IIF, &index.to_ne_bytes());
    }
    body
}

/// Reads the answer to a [`question`]; `None`: it is one that nothing can be said of.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub(crate) fn answer(body: &[u8]) -> Result<Option<Answer>, Malformed> {
    const RTA_OIF: u16 = 4;
    const RTA_GATEWAY: u16 = 5;
    const RTA_TABLE: u16 = 15;
    const RTA_VIA: u16 = 18;
    const RTN_UNICAST: u8 = 1;
    const RTN_LOCAL: u8 = 2;
    let mut table = u32::from(field_u8(body, 4)?);
    let kind = field_u8(body, 7)?;
    let (mut index, mut gateway) = (None, None);
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            RTA_OIF => index = Some(read_u32(value)?),
            RTA_GATEWAY => gateway = read_ip(value),
            RTA_VIA => gateway = decode_via(value)?,
            RTA_TABLE => table = read_u32(value)?,
            _ => {}
        }
    }
    Ok(match (kind, index) {
        (RTN_LOCAL, _) => Some(Answer::Local),
        (RTN_UNICAST, Some(index)) => Some(Answer::Through {
            index,
            gateway,
            table,
        }),
        _ => None,
    })
}

/// The meaning of the kernel's refusal to say where a packet goes: it refuses so for packets that
/// go nowhere. A filter by the way back is `EXDEV`, on newer kernels (6.18) `EINVAL` like a black
/// hole.
const fn refused(errno: Errno) -> Option<Refused> {
    match errno {
        Errno::ENETUNREACH => Some(Refused::NoRoute),
        Errno::EHOSTUNREACH => Some(Refused::Unreachable),
        Errno::EACCES => Some(Refused::Prohibited),
        Errno::EINVAL | Errno::EXDEV => Some(Refused::Dropped),
        _ => None,
    }
}

/// Reads the rules in front of the last one that leads to the main table.
pub(crate) fn rules(
    connection: &mut Connection,
    family: Family,
) -> Result<Vec<PolicyRule>, Failure> {
    let number = match family {
        Family::V4 => 2,
        Family::V6 => 10,
    };
    let mut header = [0; HEADER];
    header[0] = number;
    let mut rules = connection.dump(RTM_GETRULE, &Body::new(&header), |message| {
        if message.kind != RTM_NEWRULE {
            return Ok(None);
        }
        Ok(rule(message.body, family)?)
    })?;
    let is_main = |rule: &&PolicyRule| rule.table == Some(MAIN_TABLE);
    let main = rules.iter().filter(is_main).map(|rule| rule.priority).max();
    rules.retain(|rule| {
        /// `RT_TABLE_LOCAL`, whose rule is in front of all.
        const LOCAL_TABLE: u32 = 255;
        let leads_elsewhere = !matches!(rule.table, Some(MAIN_TABLE | LOCAL_TABLE));
        leads_elsewhere && main.is_none_or(|main| rule.priority < main)
    });
    Ok(rules)
}

/// Reads a rule; `None`: it leads to no table and refuses nothing.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub(crate) fn rule(body: &[u8], family: Family) -> Result<Option<PolicyRule>, Malformed> {
    const FRA_PRIORITY: u16 = 6;
    const FRA_TABLE: u16 = 15;
    const FR_ACT_TO_TBL: u8 = 1;
    /// `FR_ACT_BLACKHOLE`, `FR_ACT_UNREACHABLE`, `FR_ACT_PROHIBIT`.
    const REFUSES: std::ops::RangeInclusive<u8> = 6..=8;
    let (mut table, action) = (u32::from(field_u8(body, 4)?), field_u8(body, 7)?);
    let mut priority = 0;
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            FRA_PRIORITY => priority = read_u32(value)?,
            FRA_TABLE => table = read_u32(value)?,
            _ => {}
        }
    }
    let table = match action {
        FR_ACT_TO_TBL => Some(table),
        action if REFUSES.contains(&action) => None,
        _ => return Ok(None),
    };
    Ok(Some(PolicyRule {
        family,
        priority,
        table,
    }))
}
