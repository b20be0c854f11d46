//! Carrying out changes: in batches, each request answered by itself.
//!
//! A batch is one datagram. The kernel carries its requests out one after the other and does not
//! stop at one that fails, so a batch never holds an op that needs another one of the same batch:
//! an op of a higher rank than the lowest in the batch waits for the next. Nor does it mix removal
//! with making, so that an answer "exists" can be looked into after the batch. Devices, settings
//! and offloads are done one by one.

mod place;
mod routes;

use std::collections::{BTreeMap, BTreeSet};

use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Family, IfName, MAIN_TABLE, Object, ObjectKey, Op, Route, RouteProtocol, RouteTarget, Subnet,
};
use nix::errno::Errno;
use routes::Routes;

use crate::connection::{BATCH_BYTES, BATCH_REQUESTS};
use crate::error::Failure;
use crate::keys::{self, Looked};
use crate::names::Names;
use crate::wire::Batch;
use crate::worker::Worker;
use crate::{codec, device, nexthop, route, sysctl};

/// Carries out ops in their order. Stops early, with errors for the rest, if nobody waits for the
/// answer any more.
pub(crate) fn apply(
    worker: &mut Worker,
    ops: &[Op],
    abandoned: &dyn Fn() -> bool,
) -> Vec<Result<()>> {
    let mut run = Run {
        worker,
        ops,
        results: ops.iter().map(|_| None).collect(),
        names: None,
        some: Names::default(),
        asked: BTreeSet::new(),
        routes: Routes::default(),
        failed: BTreeMap::new(),
        pending: Vec::new(),
        lowest: u8::MAX,
        batch: Batch::default(),
        timed_out: false,
    };
    for (at, op) in ops.iter().enumerate() {
        if abandoned() {
            break;
        }
        run.take(at, op);
    }
    run.flush();
    run.results
        .into_iter()
        .map(|result| {
            result.unwrap_or_else(|| {
                Err(Error::Connection {
                    reason: "not tried: nobody waits for the answer".to_owned(),
                    source: None,
                })
            })
        })
        .collect()
}

struct Run<'a> {
    worker: &'a mut Worker,
    ops: &'a [Op],
    results: Vec<Option<Result<()>>>,
    /// The devices, once somebody asked for all of them.
    names: Option<Names>,
    /// Those that somebody asked for by name until then, and which of them were asked for: where there
    /// are thousands of devices, a list of all takes longer than what is to be done on one.
    some: Names,
    asked: BTreeSet<IfName>,
    /// What was read of routes.
    routes: Routes,
    /// What was not made, with what keeps from being made whatever needs it.
    failed: BTreeMap<ObjectKey, ObjectKey>,
    /// The places of the ops of the next batch.
    pending: Vec<usize>,
    /// The lowest rank among them.
    lowest: u8,
    batch: Batch,
    /// The kernel did not answer: to wait as long for each of the rest would take for ever.
    timed_out: bool,
}

/// The order among the kinds that go into batches, as [`ObjectKey::rank`] has it, without making
/// the key.
const fn rank(object: &Object) -> u8 {
    match object {
        Object::Address(_) => 1,
        Object::Fdb(_) => 2,
        Object::Neighbour(_) => 3,
        Object::Nexthop(_) => 4,
        Object::Route(_) => 5,
        _ => 0,
    }
}

impl Run<'_> {
    /// Puts an op into the batch, or carries it out if it is one that stands alone.
    fn take(&mut self, at: usize, op: &Op) {
        let deletes = matches!(op, Op::Delete(_));
        let batched = matches!(
            op.object(),
            Object::Address(_)
                | Object::Fdb(_)
                | Object::Neighbour(_)
                | Object::Nexthop(_)
                | Object::Route(_)
        );
        let rank = rank(op.object());
        let mixed = self
            .pending
            .first()
            .is_some_and(|first| matches!(self.ops[*first], Op::Delete(_)) != deletes);
        if !batched
            || mixed
            || self.pending.len() >= BATCH_REQUESTS
            || (!deletes && rank > self.lowest)
        {
            self.flush();
        }
        if self.timed_out {
            self.finish(at, Err(Error::TimedOut));
            return;
        }
        if !deletes && !self.failed.is_empty() {
            let needs = op.object().needs();
            if let Some(cause) = needs.iter().find_map(|key| self.failed.get(key)) {
                let key = cause.clone();
                self.finish(at, Err(Error::Skipped { key }));
                return;
            }
        }
        if batched {
            self.pending.push(at);
            self.lowest = self.lowest.min(rank);
        } else {
            let result = self.alone(op);
            self.finish(at, result);
        }
    }

    /// Records the result of an op.
    fn finish(&mut self, at: usize, result: Result<()>) {
        let op = &self.ops[at];
        self.timed_out |= matches!(result, Err(Error::TimedOut));
        if !matches!(op, Op::Delete(_)) {
            match &result {
                Ok(()) if self.failed.is_empty() => {}
                Ok(()) => {
                    self.failed.remove(&op.key());
                }
                Err(Error::Skipped { key }) => {
                    self.failed.insert(op.key(), key.clone());
                }
                Err(_) => {
                    self.failed.insert(op.key(), op.key());
                }
            }
        }
        if let Some(slot) = self.results.get_mut(at) {
            *slot = Some(result);
        }
    }

    /// The devices of the namespace.
    fn names(&mut self) -> Result<&Names> {
        let names = match self.names.take() {
            Some(names) => names,
            None => Names::read(&mut self.worker.route)
                .map_err(|failure| failure.meaning(None, || "reading the devices".to_owned()))?,
        };
        Ok(self.names.insert(names))
    }

    /// Devices among which one is found if it is there.
    fn names_with(&mut self, dev: Option<IfName>) -> Result<&Names> {
        if let Some(names) = &self.names {
            return Ok(names);
        }
        if let Some(dev) = dev
            && self.asked.insert(dev)
        {
            self.some
                .learn(&mut self.worker.route, dev)
                .map_err(|failure| failure.meaning(None, || format!("looking for {dev}")))?;
        }
        Ok(&self.some)
    }

    /// The routes under the kernel's key of a route.
    fn routes_under(&mut self, route: &Route) -> Result<&[Route]> {
        self.names()?;
        let names = self.names.get_or_insert_default();
        self.routes
            .under(&mut self.worker.route, names, route)
            .map_err(|failure| failure.meaning(None, || "reading routes".to_owned()))
    }

    /// Carries out an op on a device, a setting or an offload.
    fn alone(&mut self, op: &Op) -> Result<()> {
        match op.object() {
            Object::Link(link) => {
                self.names()?;
                let names = self.names.take().unwrap_or_default();
                // With the device go its routes.
                self.routes.forget();
                (self.some, self.asked) = (Names::default(), BTreeSet::new());
                let connection = &mut self.worker.route;
                match op {
                    Op::Create(_) => device::create(connection, &names, link),
                    Op::Change(_) => device::change(connection, &names, link),
                    Op::Delete(_) => device::delete(connection, &names, link),
                }
            }
            Object::Sysctl(asked) => {
                self.names()?.index(asked.dev)?;
                let found = sysctl::read(asked.dev, asked.family, &asked.name)?;
                setting(
                    op,
                    found.map(|found| found.value == asked.value.trim()),
                    || sysctl::write(asked),
                )
            }
            Object::Offload(asked) => {
                self.names()?.index(asked.dev)?;
                let failed = |failure: Failure| failure.about(op.object());
                let states = self.worker.ethtool.read(asked.dev).map_err(failed)?;
                let found = states.and_then(|states| states.get(&asked.feature).copied());
                setting(op, found.map(|on| on == asked.on), || {
                    self.worker.ethtool.write(asked)
                })
            }
            // A packet path is a program of its own: what runs it is put around this kernel.
            other @ (Object::Tunnel(_) | Object::TunnelPeer(_)) => Err(Error::Unsupported {
                what: format!(
                    "{}: wrap it in `flannel_backend_udp::WithTunnels` to have packet paths",
                    other.key()
                ),
            }),
            other => Err(Error::Unsupported {
                what: format!("objects of the kind {}", other.key().kind()),
            }),
        }
    }

    /// Sends the batch.
    fn flush(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        self.lowest = u8::MAX;
        if pending.is_empty() {
            return;
        }
        let deletes = matches!(self.ops[pending[0]], Op::Delete(_));
        let pending = if deletes {
            self.spare(pending)
        } else {
            pending
        };
        let mut sent = Vec::with_capacity(pending.len());
        for at in pending {
            match self.encode(at, None) {
                Ok(()) => sent.push(at),
                Err(error) => self.finish(at, Err(error)),
            }
            if self.batch.bytes().len() >= BATCH_BYTES {
                self.send(std::mem::take(&mut sent));
            }
        }
        self.send(sent);
    }

    /// Sends what is in the batch: the requests of these ops.
    fn send(&mut self, sent: Vec<usize>) {
        let answers = self.worker.route.transact(&mut self.batch, |_, _| Ok(()));
        self.batch.clear();
        let mut exist = Vec::new();
        for (at, answer) in sent.into_iter().zip(answers) {
            let op = &self.ops[at];
            match (op, answer) {
                (_, Ok(())) => {
                    self.routes.note(op);
                    self.finish(at, Ok(()));
                }
                (Op::Create(_), Err(failure)) if failure.errno() == Some(Errno::EEXIST) => {
                    exist.push((at, failure));
                }
                (Op::Delete(object), Err(failure)) if is_gone(object, &failure) => {
                    self.routes.note(op);
                    self.finish(at, Ok(()));
                }
                (_, Err(failure)) => {
                    if matches!(op, Op::Delete(_)) {
                        self.routes.forget();
                    }
                    self.finish(at, Err(failure.about(op.object())));
                }
            }
        }
        if !exist.is_empty() {
            self.look_into(exist);
        }
    }

    /// Appends the request of an op to the batch. `flags` are those of a making, if not the usual.
    fn encode(&mut self, at: usize, flags: Option<u16>) -> Result<()> {
        let mut batch = std::mem::take(&mut self.batch);
        let op = &self.ops[at];
        let result = self
            .names_with(op.object().dev())
            .and_then(|names| codec::encode(op, flags, |dev| names.index(dev), &mut batch));
        self.batch = batch;
        result
    }

    /// Takes out of a batch of removals what is gone already with its device, and what is not
    /// meant but which the kernel would take for it.
    ///
    /// It removes a nexthop object by its number alone, whoever made it.
    fn spare(&mut self, pending: Vec<usize>) -> Vec<usize> {
        let ops = self.ops;
        let mut queries = Batch::default();
        let mut asked: Vec<(usize, Found)> = Vec::new();
        let mut looked_up: BTreeMap<(Subnet, u32), Vec<&Route>> = BTreeMap::new();
        let mut left = Vec::with_capacity(pending.len());
        for at in pending {
            let object = ops[at].object();
            if let Some(dev) = object.dev() {
                match self
                    .names_with(Some(dev))
                    .map(|names| names.index(dev).is_ok())
                {
                    Ok(true) => {}
                    // With the device went what was on it.
                    Ok(false) => {
                        self.finish(at, Ok(()));
                        continue;
                    }
                    Err(error) => {
                        self.finish(at, Err(error));
                        continue;
                    }
                }
            }
            match object {
                Object::Nexthop(nexthop) => {
                    queries.push(nexthop::RTM_GETNEXTHOP, 0, &nexthop::reference(nexthop.id));
                    asked.push((left.len(), Found::Nexthop(None)));
                }
                // A second time the kernel would take another's for it.
                Object::Route(route)
                    if looked_up
                        .get(&(route.dst, route.metric))
                        .is_some_and(|before| before.contains(&route)) =>
                {
                    self.finish(at, Ok(()));
                    continue;
                }
                Object::Route(route)
                    if is_vague(route)
                        && route.dst.family() == Family::V4
                        && route.table == MAIN_TABLE =>
                {
                    let before = looked_up.entry((route.dst, route.metric)).or_default();
                    before.push(route);
                    queries.push(route::RTM_GETROUTE, 0, &route::lookup(route.dst));
                    asked.push((left.len(), Found::Route(Looked::Unknown)));
                }
                Object::Route(route) if is_vague(route) && !self.is_there(at, route) => continue,
                _ => {}
            }
            left.push(at);
        }
        if asked.is_empty() {
            return left;
        }
        let answers = self.worker.route.transact(&mut queries, |at, message| {
            let Some((place, found)) = asked.get_mut(at) else {
                return Ok(());
            };
            match (found, ops[left[*place]].object()) {
                (Found::Route(looked), Object::Route(route))
                    if message.kind == route::RTM_NEWROUTE =>
                {
                    let entry = route::decode(message.body)?;
                    *looked = keys::judge(route.dst, route.metric, entry);
                }
                (Found::Nexthop(found), _) => *found = nexthop::decode_message(message)?,
                _ => {}
            }
            Ok(())
        });
        let mut done = Vec::new();
        for ((place, found), answer) in asked.into_iter().zip(answers) {
            let at = left[place];
            let object = ops[at].object();
            let result = match (object, found, answer) {
                (Object::Route(route), Found::Route(looked), answer) => {
                    let names = self.names_with(object.dev());
                    let stays = match (looked, answer) {
                        (Looked::Is(entry), Ok(())) => {
                            names.is_ok_and(|names| entry.object(names).as_ref() == Ok(route))
                        }
                        (Looked::IsNot, Ok(())) => false,
                        _ => {
                            if !self.is_there(at, route) {
                                done.push(at);
                            }
                            continue;
                        }
                    };
                    if stays {
                        continue;
                    }
                    Ok(())
                }
                (Object::Nexthop(nexthop), Found::Nexthop(Some(found)), Ok(()))
                    if found.protocol == nexthop.protocol && found.path.is_some() =>
                {
                    continue;
                }
                (_, _, Ok(())) => Ok(()),
                (_, _, Err(failure)) if failure.errno() == Some(Errno::ENOENT) => Ok(()),
                (object, _, Err(failure)) => Err(failure.about(object)),
            };
            self.finish(at, result);
            done.push(at);
        }
        left.retain(|at| done.binary_search(at).is_err());
        left
    }

    /// Whether a route that is to be removed is there, by the whole table. If not, the op is done.
    fn is_there(&mut self, at: usize, route: &Route) -> bool {
        let route = route::normal(route.clone());
        match self.routes_under(&route) {
            // Noted at once, lest the same op a second time takes another's.
            Ok(found) if found.contains(&route) => {
                self.routes.note(&self.ops[at]);
                return true;
            }
            Ok(_) => self.finish(at, Ok(())),
            Err(error) => self.finish(at, Err(error)),
        }
        false
    }
}

/// What a question before a removal found.
enum Found {
    Nexthop(Option<nexthop::Entry>),
    Route(Looked),
}

/// Carries out an op on a setting, which is there as long as its device is: `right` says whether
/// it has the value asked for already, `None` that there is no such setting.
fn setting(op: &Op, right: Option<bool>, write: impl FnOnce() -> Result<()>) -> Result<()> {
    match (op, right) {
        (Op::Create(_) | Op::Change(_), Some(true)) => Ok(()),
        (Op::Create(object), Some(false)) => Err(Error::Exists {
            message: format!("{} has another value", object.key()),
        }),
        (Op::Change(_), Some(false)) => write(),
        (Op::Create(object) | Op::Change(object), None) => Err(Error::Unsupported {
            what: format!("{}", object.key()),
        }),
        (Op::Delete(object), _) => Err(Error::Unsupported {
            what: format!(
                "{}: settings are changed, never made or removed",
                object.key()
            ),
        }),
    }
}

/// Whether the kernel would take the request to remove a route for one of several: it reads the
/// metric 0 of an IPv4 route as *any* metric, the protocol 0 as *any* protocol, and in IPv6 it
/// takes a route through a nexthop object for one to any gateway or device.
fn is_vague(route: &Route) -> bool {
    route.protocol == RouteProtocol::UNSPEC
        || match route.dst.family() {
            Family::V4 => route.metric == 0,
            Family::V6 => !matches!(route.target, RouteTarget::Nexthop(_)),
        }
}

/// Whether a removal failed because there is nothing to remove.
fn is_gone(object: &Object, failure: &Failure) -> bool {
    match failure.errno() {
        Some(Errno::ENOENT | Errno::ESRCH | Errno::ENODEV) => true,
        // The kernel's word for an address that the device does not have.
        Some(Errno::EADDRNOTAVAIL) => matches!(object, Object::Address(_)),
        // A route through a nexthop object that is gone went with it.
        Some(Errno::EINVAL) => {
            matches!(object, Object::Route(_))
                && matches!(failure, Failure::Refused { text: Some(text), .. }
                    if text.contains("Nexthop id does not exist"))
        }
        _ => false,
    }
}
