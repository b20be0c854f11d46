//! Reading the state: one dump per kind, put together.

use std::collections::BTreeSet;

use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Family, IfName, MAIN_TABLE, Object, ObjectKey, Objects, Observed, Offload, Scope,
};
use nix::errno::Errno;

use crate::connection::Connection;
use crate::error::Failure;
use crate::names::{Named, Names};
use crate::witness::Witness;
use crate::worker::Worker;
use crate::{address, link, neighbour, nexthop, route, sysctl};

/// How often the state, or a part of it, is read if it is disturbed.
const TRIES: usize = 5;

/// Why a reading is of no use.
enum Torn {
    /// An object is on a device that the dump of the devices did not show.
    NewDevice,
    Failed(Failure),
}

impl From<Failure> for Torn {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Reads everything in the scope.
pub(crate) fn observe(worker: &mut Worker, scope: &Scope) -> Result<Observed> {
    for _ in 0..TRIES {
        match observe_once(worker, scope) {
            Ok(observed) => return Ok(observed),
            Err(Torn::NewDevice) => {}
            Err(Torn::Failed(failure)) => {
                return Err(failure.meaning(None, || "reading the state".to_owned()));
            }
        }
    }
    Err(Error::Interrupted)
}

/// The name of the device that an object is on; `None`: it cannot be written.
fn on(names: &Names, index: u32) -> Result<Option<IfName>, Torn> {
    known(names.name(index))
}

const fn known(named: Named) -> Result<Option<IfName>, Torn> {
    match named {
        Named::Device(name) => Ok(Some(name)),
        Named::Unspeakable => Ok(None),
        Named::Unknown => Err(Torn::NewDevice),
    }
}

/// Reads links and addresses.
pub(crate) fn links(worker: &mut Worker) -> Result<Observed> {
    for _ in 0..TRIES {
        match links_once(&mut worker.route) {
            Ok((_, mut observed, objects)) => {
                observed.objects = objects.into_iter().collect();
                return Ok(observed);
            }
            Err(Torn::NewDevice) => {}
            Err(Torn::Failed(failure)) => {
                return Err(failure.meaning(None, || "reading the devices".to_owned()));
            }
        }
    }
    Err(Error::Interrupted)
}

type Keyed = Vec<(ObjectKey, Object)>;

fn links_once(connection: &mut Connection) -> Result<(Names, Observed, Keyed), Torn> {
    let devices = link::dump(connection)?;
    let names = Names::of(&devices);
    let mut observed = Observed {
        links: devices.iter().filter_map(|d| d.info(&names)).collect(),
        ..Observed::default()
    };
    let mut objects = Vec::new();
    for device in &devices {
        if let Some(link) = device.object(&names) {
            objects.push(keyed(Object::Link(link)));
        }
    }
    for entry in address::dump(connection)? {
        if let Some(dev) = on(&names, entry.index)? {
            observed.addresses.push(entry.info(dev));
            objects.push(keyed(Object::Address(entry.object(dev))));
        }
    }
    Ok((names, observed, objects))
}

fn observe_once(worker: &mut Worker, scope: &Scope) -> Result<Observed, Torn> {
    let connection = &mut worker.route;
    let (names, mut observed, mut objects) = links_once(connection)?;
    entries(connection, scope, &names, &mut objects)?;
    for entry in unsupported_is_empty(nexthop::dump(connection))? {
        let Some((index, _)) = entry.path else {
            continue;
        };
        if let Some(object) = on(&names, index)?.and_then(|dev| entry.object(dev)) {
            objects.push(keyed(Object::Nexthop(object)));
        }
    }
    for family in Family::ALL {
        for entry in route::dump(connection, family, MAIN_TABLE)? {
            match entry.object(&names) {
                Ok(route) => objects.push(keyed(Object::Route(route))),
                Err(named) => drop(known(named)?),
            }
        }
    }
    // `all` and `default` are folders beside those of the devices.
    let is_device = |dev| names.index(dev).is_ok();
    settings(worker, &scope.settings, is_device, &mut objects)?;
    // The first of several under one key is the one that the kernel uses: a map built from the
    // reversed list keeps it. Sorting once is quicker than inserting one by one.
    objects.reverse();
    observed.objects = objects.into_iter().collect::<Objects>();
    Ok(observed)
}

fn keyed(object: Object) -> (ObjectKey, Object) {
    (object.key(), object)
}

/// Reads the forwarding entries and neighbours of the scope's devices.
fn entries(
    connection: &mut Connection,
    scope: &Scope,
    names: &Names,
    objects: &mut Vec<(ObjectKey, Object)>,
) -> Result<(), Torn> {
    if scope.devices.is_empty() {
        return Ok(());
    }
    let mut witness = Witness::new()?;
    for dev in &scope.devices {
        let Ok(index) = names.index(*dev) else {
            continue;
        };
        for entry in undisturbed(connection, &mut witness, index, neighbour::dump_fdb)? {
            objects.extend(entry.fdb(*dev).map(|fdb| keyed(Object::Fdb(fdb))));
        }
        for entry in undisturbed(connection, &mut witness, index, neighbour::dump)? {
            objects.extend(entry.neighbour(*dev).map(|n| keyed(Object::Neighbour(n))));
        }
    }
    Ok(())
}

/// A dump of a device during which none of its entries was removed.
fn undisturbed(
    connection: &mut Connection,
    witness: &mut Witness,
    index: u32,
    dump: fn(&mut Connection, u32) -> Result<Vec<neighbour::Entry>, Failure>,
) -> Result<Vec<neighbour::Entry>, Failure> {
    witness.saw_removal(index)?;
    for _ in 0..TRIES {
        let entries = match dump(connection, index) {
            // A device that was deleted after the devices were read has nothing on it any more.
            Err(failure) if failure.errno() == Some(Errno::ENODEV) => Vec::new(),
            other => other?,
        };
        if !witness.saw_removal(index)? {
            return Ok(entries);
        }
    }
    Err(Failure::Interrupted)
}

/// A kernel without nexthop objects has none.
fn unsupported_is_empty<T>(answer: Result<Vec<T>, Failure>) -> Result<Vec<T>, Failure> {
    match answer {
        Err(failure) if failure.errno() == Some(Errno::EOPNOTSUPP) => Ok(Vec::new()),
        other => other,
    }
}

/// Reads settings and offloads and nothing else.
pub(crate) fn settings_alone(worker: &mut Worker, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
    let is_device = |dev: IfName| !matches!(dev.as_str(), "all" | "default");
    let mut objects = Vec::new();
    settings(worker, keys, is_device, &mut objects)
        .map_err(|failure| failure.meaning(None, || "reading settings".to_owned()))?;
    Ok(objects.into_iter().collect())
}

/// Reads the settings and offloads of the scope. One that does not exist is left out.
fn settings(
    worker: &mut Worker,
    keys: &BTreeSet<ObjectKey>,
    is_device: impl Fn(IfName) -> bool,
    objects: &mut Vec<(ObjectKey, Object)>,
) -> Result<(), Failure> {
    let mut features: Option<(IfName, Option<crate::offload::States>)> = None;
    for key in keys {
        match key {
            ObjectKey::Sysctl { dev, family, name } => {
                // One that cannot be read is left out: writing it will say why.
                if is_device(*dev)
                    && let Ok(Some(found)) = sysctl::read(*dev, *family, name)
                {
                    objects.push(keyed(Object::Sysctl(found)));
                }
            }
            ObjectKey::Offload { dev, feature } => {
                // The keys of one device stand together.
                if features.as_ref().is_none_or(|(of, _)| of != dev) {
                    features = Some((*dev, worker.ethtool.read(*dev)?));
                }
                let on = features
                    .as_ref()
                    .and_then(|(_, states)| states.as_ref()?.get(feature).copied());
                if let Some(on) = on {
                    objects.push(keyed(Object::Offload(Offload {
                        dev: *dev,
                        feature: feature.clone(),
                        on,
                    })));
                }
            }
            _ => {}
        }
    }
    Ok(())
}
