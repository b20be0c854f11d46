//! What a call knows of routes, which the kernel does not tell one by one.

use std::collections::BTreeMap;

use flannel_core::{Family, Object, Op, Route, RouteTarget, Subnet};

use crate::connection::Connection;
use crate::error::Failure;
use crate::names::Names;
use crate::route;

/// The routes of a table and family by destination and metric, in the kernel's order.
type Table = BTreeMap<(Subnet, u32), Vec<Route>>;

/// The tables that were read in this call, kept up to date with what the call does to them.
#[derive(Debug, Default)]
pub(super) struct Routes(BTreeMap<(u32, Family), Table>);

impl Routes {
    /// The routes under the kernel's key of a route.
    pub(super) fn under(
        &mut self,
        connection: &mut Connection,
        names: &Names,
        route: &Route,
    ) -> Result<&[Route], Failure> {
        let of = (route.table, route.dst.family());
        let table = match self.0.entry(of) {
            std::collections::btree_map::Entry::Occupied(table) => table.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(read(connection, names, of)?)
            }
        };
        Ok(table
            .get(&(route.dst, route.metric))
            .map_or(&[], Vec::as_slice))
    }

    /// Forgets everything: something may have taken routes along.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    /// Takes note of an op that succeeded.
    pub(super) fn note(&mut self, op: &Op) {
        if self.0.is_empty() {
            return;
        }
        match op.object() {
            Object::Route(route) => {
                let route = route::normal(route.clone());
                let Some(table) = self.0.get_mut(&(route.table, route.dst.family())) else {
                    return;
                };
                let place = table.entry((route.dst, route.metric)).or_default();
                match op {
                    Op::Create(_) => place.push(route),
                    Op::Change(_) => {
                        place.drain(..place.len().min(1));
                        place.insert(0, route);
                    }
                    Op::Delete(_) => place.retain(|found| *found != route),
                }
            }
            // With a nexthop go the routes through it, with the last address of a device too.
            Object::Nexthop(_) | Object::Address(_) if matches!(op, Op::Delete(_)) => {
                self.forget();
            }
            _ => {}
        }
    }
}

fn read(
    connection: &mut Connection,
    names: &Names,
    (table, family): (u32, Family),
) -> Result<Table, Failure> {
    let mut routes = Table::new();
    for entry in route::dump(connection, family, table)? {
        let key = (entry.dst, entry.metric);
        // One on a device that cannot be named is none of ours, but it is in the place.
        let route = entry.object(names).unwrap_or_else(|_| Route {
            table,
            dst: entry.dst,
            metric: entry.metric,
            target: RouteTarget::Other("a device without a name".to_owned()),
            protocol: entry.protocol,
            source: None,
        });
        routes.entry(key).or_default().push(route);
    }
    Ok(routes)
}
