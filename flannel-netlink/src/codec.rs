//! From an op to a request and from a message to an object, without a kernel.
//!
//! Not for use by others: it is public for the project's own tests and benchmarks.

use std::collections::BTreeMap;

use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Change, Family, FilterChain, IfName, Object, Offload, Op, PolicyRule, RouteProtocol,
    RouteTarget,
};

use crate::error::Failure;
use crate::names::{Named, Names};
use crate::wire::Messages;
pub use crate::wire::{Batch, Malformed};
use crate::{
    CREATE, EXCL, REPLACE, address, filter, link, lookup, neighbour, nexthop, offload, route, watch,
};

/// Appends the request that carries out an op. `index` gives the index of a device; `flags`
/// replace those that the verb of a making has.
///
/// # Errors
/// Those of `index`; [`Error::Rejected`] for what the kernel would misunderstand;
/// [`Error::Unsupported`] for what is not done in one request.
pub fn encode(
    op: &Op,
    flags: Option<u16>,
    index: impl Fn(IfName) -> Result<u32>,
    batch: &mut Batch,
) -> Result<()> {
    check(op)?;
    let (deletes, flags) = match op {
        Op::Create(_) => (false, flags.unwrap_or(CREATE | EXCL)),
        // With CREATE: what went away a moment ago is to be as given, too.
        Op::Change(_) => (false, flags.unwrap_or(CREATE | REPLACE)),
        Op::Delete(_) => (true, 0),
    };
    let kind = |make: u16, remove: u16| if deletes { remove } else { make };
    match op.object() {
        Object::Address(o) => batch.push(
            kind(address::RTM_NEWADDR, address::RTM_DELADDR),
            flags,
            &address::message(o, index(o.dev)?),
        ),
        Object::Fdb(o) => batch.push(
            kind(neighbour::RTM_NEWNEIGH, neighbour::RTM_DELNEIGH),
            flags,
            &neighbour::fdb_message(o, index(o.dev)?),
        ),
        Object::Neighbour(o) => batch.push(
            kind(neighbour::RTM_NEWNEIGH, neighbour::RTM_DELNEIGH),
            flags,
            &neighbour::neighbour_message(o, index(o.dev)?),
        ),
        Object::Nexthop(o) if deletes => {
            batch.push(nexthop::RTM_DELNEXTHOP, flags, &nexthop::reference(o.id));
        }
        Object::Nexthop(o) => batch.push(
            nexthop::RTM_NEWNEXTHOP,
            flags,
            &nexthop::message(o, index(o.dev)?),
        ),
        Object::Route(o) if deletes => batch.push(
            route::RTM_DELROUTE,
            flags,
            &route::removal(&route::normal(o.clone()), index)?,
        ),
        Object::Route(o) => batch.push(route::RTM_NEWROUTE, flags, &route::message(o, index)?),
        Object::Link(o) if matches!(op, Op::Create(_)) => {
            let message = link::creation(o, link::underlay(o).map(index).transpose()?)?;
            batch.push(link::RTM_NEWLINK, flags, &message);
        }
        other => {
            return Err(Error::Unsupported {
                what: format!("{} {} in one request", op.verb(), other.key().kind()),
            });
        }
    }
    Ok(())
}

/// Refuses what the kernel would take for something else than what is meant.
fn check(op: &Op) -> Result<()> {
    let deletes = matches!(op, Op::Delete(_));
    let why = match op.object() {
        Object::Fdb(o) if !o.mac.is_unicast() => {
            "the hardware address is that of no one device, so it would be one of several remotes"
        }
        Object::Nexthop(o) if o.id == 0 => {
            "the number of a nexthop must not be 0: the kernel would choose one"
        }
        Object::Route(o) if o.table == 0 => {
            "the table of a route must not be 0: the kernel would take the main table"
        }
        Object::Route(o)
            if o.protocol == RouteProtocol::UNSPEC && o.dst.family() == Family::V6 && !deletes =>
        {
            "the protocol of an IPv6 route must not be 0: the kernel would make it 3"
        }
        Object::Route(o) if o.target == RouteTarget::Nexthop(0) => {
            "the number of a nexthop must not be 0: the kernel would take it for none"
        }
        _ => return Ok(()),
    };
    Err(Error::Rejected {
        message: why.to_owned(),
    })
}

/// The objects that the messages of a datagram stand for, given the devices by index. What no
/// object can stand for is left out.
///
/// # Errors
/// [`Malformed`] if it is no datagram of netlink messages or a message is cut.
pub fn decode(
    datagram: &[u8],
    devices: &BTreeMap<u32, IfName>,
) -> std::result::Result<Vec<Object>, Malformed> {
    let names = Names::from_map(devices);
    let mut objects = Vec::new();
    for message in Messages(datagram) {
        let message = message?;
        let object = match message.kind {
            link::RTM_NEWLINK => link::decode(message.body)?.object(&names).map(Object::Link),
            address::RTM_NEWADDR => address::decode(message.body)?
                .and_then(|entry| Some(entry.object(names.get(entry.index)?)))
                .map(Object::Address),
            neighbour::RTM_NEWNEIGH => {
                let entry = neighbour::decode(message.body)?;
                names.get(entry.index).and_then(|dev| {
                    let fdb = entry.fdb(dev).map(Object::Fdb);
                    fdb.or_else(|| entry.neighbour(dev).map(Object::Neighbour))
                })
            }
            nexthop::RTM_NEWNEXTHOP => nexthop::decode(message.body)?
                .and_then(|entry| entry.object(names.get(entry.path?.0)?))
                .map(Object::Nexthop),
            route::RTM_NEWROUTE => route::decode(message.body)?
                .and_then(|entry| entry.object(&names).map_err(|_: Named| ()).ok())
                .map(Object::Route),
            _ => None,
        };
        objects.extend(object);
    }
    Ok(objects)
}

/// The features of a device, as an answer of ethtool tells of them: whether each is on.
///
/// # Errors
/// [`Malformed`] if the answer is cut.
pub fn decode_features(body: &[u8]) -> std::result::Result<BTreeMap<String, bool>, Malformed> {
    offload::decode(body)
}

/// Appends the request that switches a feature of a device; its kind is left open.
pub fn encode_offload(offload: &Offload, batch: &mut Batch) {
    batch.push(0, 0, &offload::message(offload));
}

/// What the events of a datagram tell whoever knows no device yet.
///
/// # Errors
/// As [`decode`].
pub fn decode_events(datagram: &[u8]) -> std::result::Result<Vec<Change>, Malformed> {
    watch::hints(datagram)
}

/// Tells if the body of a message says what becomes of a packet.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub fn decode_way(body: &[u8]) -> std::result::Result<bool, Malformed> {
    Ok(lookup::answer(body)?.is_some())
}

/// A rule of policy routing for IPv4, as the body of a message tells it.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub fn decode_rule(body: &[u8]) -> std::result::Result<Option<PolicyRule>, Malformed> {
    lookup::rule(body, Family::V4)
}

/// A chain that drops what is forwarded, as the body of a message tells it.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub fn decode_chain(body: &[u8]) -> std::result::Result<Option<FilterChain>, Malformed> {
    filter::decode(body)
}

/// Reads an acknowledgement: the kernel's number and text, if it is none.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub fn decode_answer(
    flags: u16,
    body: &[u8],
) -> std::result::Result<Option<(i32, Option<String>)>, Malformed> {
    crate::error::read_answer(flags, body).map(refusal)
}

/// Reads the end of a dump: the kernel's number and text, if it is a bad one.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub fn decode_done(
    flags: u16,
    body: &[u8],
) -> std::result::Result<Option<(i32, Option<String>)>, Malformed> {
    crate::error::read_done(flags, body).map(refusal)
}

fn refusal(failure: Option<Failure>) -> Option<(i32, Option<String>)> {
    match failure {
        Some(Failure::Refused { errno, text }) => Some((errno as i32, text)),
        _ => None,
    }
}
