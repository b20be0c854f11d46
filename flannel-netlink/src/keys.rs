//! Reading what is under some keys, and nothing else.
//!
//! Neighbours, forwarding entries and nexthop objects are asked for by their keys. The kernel gives no
//! route by its key, but it says which one a packet would take (`RTM_F_FIB_MATCH`): the most specific
//! one that holds the address. Is that the one asked for, or a less specific one of the main table, the
//! answer is certain. Anything else (another table's, a more specific one, one of another metric, none)
//! says nothing of the key, and the table is read.

use std::collections::{BTreeMap, BTreeSet};

use flannel_core::kernel::Result;
use flannel_core::{Family, IfName, MAIN_TABLE, Object, ObjectKey, Objects, Subnet};
use nix::errno::Errno;

use crate::connection::{BATCH_REQUESTS, Connection};
use crate::error::Failure;
use crate::names::Names;
use crate::wire::Batch;
use crate::worker::Worker;
use crate::{link, neighbour, nexthop, observe, route};

/// Reads what is under some keys.
pub(crate) fn read(worker: &mut Worker, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
    let is_setting =
        |key: &&ObjectKey| matches!(key, ObjectKey::Sysctl { .. } | ObjectKey::Offload { .. });
    let settings: BTreeSet<_> = keys.iter().filter(is_setting).cloned().collect();
    let mut found = if settings.is_empty() {
        Objects::new()
    } else {
        observe::settings_alone(worker, &settings)?
    };
    let is_host = |key: &ObjectKey| matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
    if keys.iter().any(is_host) {
        let mut host = observe::links(worker)?.objects;
        host.retain(|key, _| keys.contains(key));
        found.append(&mut host);
    }
    let asked: Vec<&ObjectKey> = keys.iter().filter(|key| is_asked_for(key)).collect();
    if !asked.is_empty() {
        read_asked(&mut worker.route, &asked, &mut found)
            .map_err(|failure| failure.meaning(None, || "reading some keys".to_owned()))?;
    }
    Ok(found)
}

const fn is_asked_for(key: &ObjectKey) -> bool {
    matches!(
        key,
        ObjectKey::Fdb { .. }
            | ObjectKey::Neighbour { .. }
            | ObjectKey::Nexthop(_)
            | ObjectKey::Route { .. }
    )
}

/// What a lookup says of a key.
pub(crate) enum Looked {
    /// This is under it.
    Is(route::Entry),
    /// There is nothing under it.
    IsNot,
    /// It does not say.
    Unknown,
}

fn read_asked(
    connection: &mut Connection,
    keys: &[&ObjectKey],
    found: &mut Objects,
) -> Result<(), Failure> {
    let names = Names::of(&link::dump(connection)?);
    let mut tables: BTreeMap<Family, BTreeSet<(Subnet, u32)>> = BTreeMap::new();
    for keys in keys.chunks(BATCH_REQUESTS) {
        let mut batch = Batch::default();
        let mut asked = Vec::new();
        for key in keys {
            if ask(key, &names, &mut batch) {
                asked.push(*key);
            }
        }
        let mut objects: Vec<Option<Object>> = vec![None; asked.len()];
        let mut routes: Vec<Looked> = asked.iter().map(|_| Looked::Unknown).collect();
        let answers = connection.transact(&mut batch, |at, message| {
            match asked.get(at) {
                Some(ObjectKey::Route { dst, metric, .. }) => {
                    if let (route::RTM_NEWROUTE, Some(slot)) = (message.kind, routes.get_mut(at)) {
                        *slot = judge(*dst, *metric, route::decode(message.body)?);
                    }
                }
                Some(key) => {
                    let object = match (key, message.kind) {
                        (ObjectKey::Fdb { dev, .. }, neighbour::RTM_NEWNEIGH) => {
                            neighbour::decode(message.body)?.fdb(*dev).map(Object::Fdb)
                        }
                        (ObjectKey::Neighbour { dev, .. }, neighbour::RTM_NEWNEIGH) => {
                            let entry = neighbour::decode(message.body)?;
                            entry.neighbour(*dev).map(Object::Neighbour)
                        }
                        (ObjectKey::Nexthop(_), nexthop::RTM_NEWNEXTHOP) => {
                            nexthop::decode(message.body)?.and_then(|entry| {
                                let dev = names.get(entry.path?.0)?;
                                entry.object(dev).map(Object::Nexthop)
                            })
                        }
                        _ => None,
                    };
                    if let Some(slot) = objects.get_mut(at) {
                        *slot = object;
                    }
                }
                None => {}
            }
            Ok(())
        });
        for (((key, answer), object), route) in
            asked.into_iter().zip(answers).zip(objects).zip(routes)
        {
            if let ObjectKey::Route { dst, metric, .. } = key {
                match (answer, route) {
                    (Ok(()), Looked::Is(entry)) => {
                        if let Ok(route) = entry.object(&names) {
                            found.insert(key.clone(), Object::Route(route));
                        }
                    }
                    (Ok(()), Looked::IsNot) => {}
                    (Err(failure), _) if failure.errno().is_none() => return Err(failure),
                    _ => {
                        let table = tables.entry(dst.family()).or_default();
                        table.insert((*dst, *metric));
                    }
                }
                continue;
            }
            match answer {
                Ok(()) => found.extend(object.map(|object| (key.clone(), object))),
                Err(failure) if is_nothing(&failure) => {}
                Err(failure) => return Err(failure),
            }
        }
    }
    for (family, wanted) in tables {
        for entry in route::dump(connection, family, MAIN_TABLE)? {
            if wanted.contains(&(entry.dst, entry.metric))
                && let Ok(route) = entry.object(&names)
            {
                let object = Object::Route(route);
                // The first of several under one key is the one that the kernel uses.
                found.entry(object.key()).or_insert(object);
            }
        }
    }
    Ok(())
}

/// Appends the question for a key; no: there is no such device, so there is nothing.
fn ask(key: &ObjectKey, names: &Names, batch: &mut Batch) -> bool {
    let index = |dev: IfName| names.index(dev).ok();
    match *key {
        ObjectKey::Fdb { dev, mac } => {
            let Some(index) = index(dev) else {
                return false;
            };
            let query = neighbour::fdb_query(mac, index);
            batch.push(neighbour::RTM_GETNEIGH, 0, &query);
        }
        ObjectKey::Neighbour { dev, ip } => {
            let Some(index) = index(dev) else {
                return false;
            };
            let query = neighbour::neighbour_query(ip, index);
            batch.push(neighbour::RTM_GETNEIGH, 0, &query);
        }
        ObjectKey::Nexthop(id) => {
            batch.push(nexthop::RTM_GETNEXTHOP, 0, &nexthop::reference(id));
        }
        ObjectKey::Route { table, dst, .. } => {
            if table != MAIN_TABLE {
                return false;
            }
            batch.push(route::RTM_GETROUTE, 0, &route::lookup(dst));
        }
        _ => return false,
    }
    true
}

/// Reads the answer to a [`route::lookup`].
pub(crate) fn judge(dst: Subnet, metric: u32, entry: Option<route::Entry>) -> Looked {
    match entry {
        Some(entry) if entry.table != MAIN_TABLE => Looked::Unknown,
        Some(entry) if entry.dst == dst && entry.metric == metric => Looked::Is(entry),
        Some(entry) if entry.dst.len() < dst.len() => Looked::IsNot,
        _ => Looked::Unknown,
    }
}

/// Whether a question was refused because there is nothing to tell of.
fn is_nothing(failure: &Failure) -> bool {
    matches!(
        failure.errno(),
        Some(Errno::ENOENT | Errno::ESRCH | Errno::ENODEV | Errno::EOPNOTSUPP)
    )
}
