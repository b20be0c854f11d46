//! What is in the place of objects that could not be made because of it.

use flannel_core::kernel::{Error, Result};
use flannel_core::{Address, Object, Route};

use super::Run;
use crate::error::Failure;
use crate::wire::Batch;
use crate::{CREATE, REPLACE, address, neighbour, nexthop, route};

/// What is in the place of an object.
#[derive(Debug, Clone, Copy)]
enum Found {
    Nothing,
    Neighbour(neighbour::Entry),
    Nexthop(nexthop::Entry),
}

/// What to make of it.
enum Judgement {
    Same,
    Other(String),
    GivesWay,
    Unknown,
}

impl Run<'_> {
    /// Finds out what is in the place of objects that could not be made for it. The very object is
    /// success. A neighbour or forwarding entry that came by itself gives way: it is no
    /// configuration, and nobody sees it where configuration is read.
    pub(super) fn look_into(&mut self, exist: Vec<(usize, Failure)>) {
        let ops = self.ops;
        let mut queries = Batch::default();
        let mut asked = Vec::new();
        let mut addresses = None;
        // What is in the place may be on any device.
        if self.names().is_err() {
            for (at, failure) in exist {
                self.finish(at, Err(failure.about(ops[at].object())));
            }
            return;
        }
        for (at, failure) in exist {
            let object = ops[at].object();
            match object {
                Object::Fdb(_) | Object::Neighbour(_) | Object::Nexthop(_) => {
                    if let Err(error) = self.query(object, &mut queries) {
                        self.finish(at, Err(error));
                    } else {
                        asked.push((at, failure));
                    }
                }
                Object::Route(route) => {
                    let route = route::normal(route.clone());
                    let result = match self.routes_under(&route).map(<[Route]>::first) {
                        Ok(Some(found)) if *found == route => Ok(()),
                        Ok(Some(found)) => Err(Error::Exists {
                            message: Object::Route(found.clone()).to_string(),
                        }),
                        Ok(None) => Err(failure.about(object)),
                        Err(error) => Err(error),
                    };
                    self.finish(at, result);
                }
                Object::Address(asked) => {
                    let dump = addresses
                        .get_or_insert_with(|| address::dump(&mut self.worker.route))
                        .clone();
                    let result = self.address_exists(asked, dump, failure);
                    self.finish(at, result);
                }
                _ => self.finish(at, Err(failure.about(object))),
            }
        }
        let mut found = vec![Found::Nothing; asked.len()];
        let answers = self.worker.route.transact(&mut queries, |at, message| {
            if let Some(slot) = found.get_mut(at) {
                if let Some(entry) = neighbour::decode_message(message)? {
                    *slot = Found::Neighbour(entry);
                } else if let Some(entry) = nexthop::decode_message(message)? {
                    *slot = Found::Nexthop(entry);
                }
            }
            Ok(())
        });
        let mut replaced = Vec::new();
        for (((at, failure), found), answer) in asked.into_iter().zip(found).zip(answers) {
            let object = ops[at].object();
            let result = match answer {
                Err(failure) => Err(failure.about(object)),
                Ok(()) => match self.judge(object, &found) {
                    Judgement::Same => Ok(()),
                    Judgement::Other(message) => Err(Error::Exists { message }),
                    Judgement::GivesWay => match self.encode(at, Some(CREATE | REPLACE)) {
                        Ok(()) => {
                            replaced.push(at);
                            continue;
                        }
                        Err(error) => Err(error),
                    },
                    Judgement::Unknown => Err(failure.about(object)),
                },
            };
            self.finish(at, result);
        }
        let answers = self.worker.route.transact(&mut self.batch, |_, _| Ok(()));
        self.batch.clear();
        for (at, answer) in replaced.into_iter().zip(answers) {
            self.finish(
                at,
                answer.map_err(|failure| failure.about(ops[at].object())),
            );
        }
    }

    /// Appends the question for what is in the place of an object.
    fn query(&mut self, object: &Object, queries: &mut Batch) -> Result<()> {
        match object {
            Object::Fdb(o) => {
                let index = self.names_with(Some(o.dev))?.index(o.dev)?;
                queries.push(
                    neighbour::RTM_GETNEIGH,
                    0,
                    &neighbour::fdb_query(o.mac, index),
                );
            }
            Object::Neighbour(o) => {
                let index = self.names_with(Some(o.dev))?.index(o.dev)?;
                queries.push(
                    neighbour::RTM_GETNEIGH,
                    0,
                    &neighbour::neighbour_query(o.ip, index),
                );
            }
            Object::Nexthop(o) => {
                queries.push(nexthop::RTM_GETNEXTHOP, 0, &nexthop::reference(o.id));
            }
            _ => {}
        }
        Ok(())
    }

    /// Compares what was asked for with what is there.
    fn judge(&self, asked: &Object, found: &Found) -> Judgement {
        let named = |index: u32| self.names.as_ref().and_then(|names| names.get(index));
        let is = match (asked, found) {
            (_, Found::Nothing) => return Judgement::Unknown,
            (Object::Fdb(_) | Object::Neighbour(_), Found::Neighbour(entry))
                if !entry.is_permanent() =>
            {
                return Judgement::GivesWay;
            }
            (Object::Fdb(_), Found::Neighbour(entry)) => named(entry.index)
                .and_then(|dev| entry.fdb(dev))
                .map(Object::Fdb),
            (Object::Neighbour(_), Found::Neighbour(entry)) => named(entry.index)
                .and_then(|dev| entry.neighbour(dev))
                .map(Object::Neighbour),
            (Object::Nexthop(_), Found::Nexthop(entry)) => entry
                .path
                .and_then(|(index, _)| entry.object(named(index)?))
                .map(Object::Nexthop),
            _ => None,
        };
        match is {
            Some(is) if is == *asked => Judgement::Same,
            Some(is) => Judgement::Other(is.to_string()),
            None => Judgement::Other(format!("{} of another form", asked.key())),
        }
    }

    fn address_exists(
        &mut self,
        asked: &Address,
        dump: Result<Vec<address::Entry>, Failure>,
        failure: Failure,
    ) -> Result<()> {
        let object = || Object::Address(asked.clone());
        let index = self.names()?.index(asked.dev)?;
        let found = dump
            .map_err(|failure| failure.about(&object()))?
            .into_iter()
            .filter(|entry| entry.index == index && entry.ip == asked.ip)
            .map(|entry| entry.object(asked.dev))
            .collect::<Vec<_>>();
        if found.contains(asked) {
            return Ok(());
        }
        Err(match found.into_iter().next() {
            Some(other) => Error::Exists {
                message: Object::Address(other).to_string(),
            },
            None => failure.about(&object()),
        })
    }
}
