//! Making, changing and removing a device: several requests each, and a look at what came of them.

use std::net::IpAddr;

use flannel_core::kernel::{Error, Result};
use flannel_core::{IfName, Link, LinkKind, Object, Tun, Vxlan, udp_port_holder};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use nix::errno::Errno;
use rtnetlink::LinkUnspec;

use crate::connection::Connection;
use crate::error::{Failure, no_device};
use crate::link::{
    Device, RTM_DELLINK, RTM_NEWLINK, RTM_SETLINK, alteration, creation, dump, get, no_link_local,
    underlay,
};
use crate::names::Names;
use crate::{CREATE, EXCL, tun};

/// Whether what is there is what was asked for. What was not asked is right as it is.
pub(crate) fn satisfies(found: &Link, asked: &Link) -> Result<(), String> {
    let differs = |what: &str, found: &dyn std::fmt::Debug, asked: &dyn std::fmt::Debug| {
        Err(format!("{what} is {found:?} and not {asked:?}"))
    };
    match (&found.kind, &asked.kind) {
        (LinkKind::Veth { .. }, LinkKind::Veth { peer: None }) => {}
        (LinkKind::Tun(is), LinkKind::Tun(wanted)) if is.is_like(*wanted) => {
            if wanted.queue.is_some() && is.queue != wanted.queue {
                return differs("queue length", &is.queue, &wanted.queue);
            }
        }
        (is, wanted) if is == wanted => {}
        (is, wanted) => return differs("kind", is, wanted),
    }
    if asked.mtu.is_some() && found.mtu != asked.mtu {
        return differs("MTU", &found.mtu, &asked.mtu);
    }
    if asked.mac.is_some() && found.mac != asked.mac {
        return differs("hardware address", &found.mac, &asked.mac);
    }
    if asked.alias.is_some() && found.alias != asked.alias {
        return differs("alias", &found.alias, &asked.alias);
    }
    if found.up != asked.up {
        return differs("up", &found.up, &asked.up);
    }
    Ok(())
}

fn underlay_index(link: &Link, names: &Names) -> Result<Option<u32>> {
    underlay(link).map(|dev| names.index(dev)).transpose()
}

/// Makes a device. If that fails half-way nothing stays behind.
pub(crate) fn create(connection: &mut Connection, names: &Names, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(None, || format!("link {}", link.name));
    if let LinkKind::Tun(tun) = &link.kind {
        return create_tun(connection, link, *tun);
    }
    let message = creation(link, underlay_index(link, names)?)?;
    if let Err(failure) = connection.request(RTM_NEWLINK, CREATE | EXCL, &message) {
        if failure.errno() == Some(Errno::EEXIST)
            && let Some(answer) = in_place(connection, link)?
        {
            return answer;
        }
        return Err(match failure.errno() {
            // Not the device itself but what it is bound to.
            Some(Errno::ENODEV) => no_device(underlay(link).unwrap_or(link.name)),
            _ => failed(failure),
        });
    }
    finish_or_remove(connection, link)
}

/// The answer to who would make what is there already; `None`: nothing is there.
fn in_place(connection: &mut Connection, link: &Link) -> Result<Option<Result<()>>> {
    let failed = |failure: Failure| failure.meaning(None, || format!("link {}", link.name));
    let Some(device) = get(connection, link.name).map_err(failed)? else {
        return Ok(None);
    };
    let found = object(connection, &device).map_err(failed)?;
    Ok(found.map(|found| {
        satisfies(&found, link).map_err(|why| Error::Exists {
            message: format!("{}: its {why}", Object::Link(found.clone())),
        })
    }))
}

/// Makes a TUN device.
fn create_tun(connection: &mut Connection, link: &Link, tun: Tun) -> Result<()> {
    if link.mac.is_some() {
        return Err(Error::Rejected {
            message: format!("{}: a TUN device has no hardware address", link.name),
        });
    }
    match tun::make(link.name, tun) {
        Ok(held) => {
            let finished = finish_or_remove(connection, link);
            drop(held);
            finished
        }
        Err(error @ Error::Exists { .. }) => match in_place(connection, link)? {
            Some(answer) => answer,
            None => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// Finishes a device that was just made; if that fails, nothing stays behind.
fn finish_or_remove(connection: &mut Connection, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(None, || format!("link {}", link.name));
    let device = get(connection, link.name)
        .map_err(failed)?
        .ok_or_else(|| no_device(link.name))?;
    let finished = finish(connection, &device, link);
    if finished.is_err() {
        // What failed is told; that the rest is gone is seen when the state is read again. By its
        // index, lest another that came by the name meanwhile is hit.
        drop(connection.request(RTM_DELLINK, 0, &by_index(&device)));
    }
    finished
}

/// How many packets wait in a device, where that is said.
const fn queue(link: &Link) -> Option<u32> {
    match &link.kind {
        LinkKind::Tun(tun) => tun.queue,
        _ => None,
    }
}

fn by_index(device: &Device) -> LinkMessage {
    LinkUnspec::new_with_index(device.index).build()
}

/// Sets what can only be set on a device that is there, brings it up and reads it back.
fn finish(connection: &mut Connection, device: &Device, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    if matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Tun(_)) {
        // No IPv6 link-local address: nobody uses it, and its duplicate detection would send
        // packets into the overlay. The kernel refuses this while it makes the device. A kernel
        // without IPv6 has nothing to switch off.
        match connection.request(RTM_SETLINK, 0, &no_link_local(device.index)) {
            Err(failure)
                if !matches!(
                    failure.errno(),
                    Some(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)
                ) =>
            {
                return Err(failed(failure));
            }
            _ => {}
        }
    }
    // Other kinds got theirs in the message that made them.
    let mtu = link.mtu.filter(|_| matches!(link.kind, LinkKind::Tun(_)));
    let queue = queue(link);
    if link.alias.is_some() || link.up || mtu.is_some() || queue.is_some() {
        let mut builder = LinkUnspec::new_with_index(device.index);
        if let Some(mtu) = mtu {
            builder = builder.mtu(mtu);
        }
        if let Some(queue) = queue {
            builder = builder.append_extra_attribute(LinkAttribute::TxQueueLen(queue));
        }
        if let Some(alias) = &link.alias {
            builder = builder.alias(alias.clone());
        }
        if link.up {
            builder = builder.up();
        }
        set(connection, link, &builder.build())?;
    }
    verify(connection, link)
}

/// Sets what is set on a device that is there.
fn set(connection: &mut Connection, link: &Link, message: &LinkMessage) -> Result<()> {
    match (connection.request(RTM_SETLINK, 0, message), &link.kind) {
        (Ok(()), _) => Ok(()),
        (Err(failure), LinkKind::Vxlan(vxlan)) if failure.errno() == Some(Errno::EADDRINUSE) => {
            Err(Error::InUse {
                what: format!("UDP port {}", vxlan.port),
                by: port_holder(connection, link.name, vxlan),
            })
        }
        (Err(failure), _) => Err(failure.meaning(Some(link.name), || link.name.to_string())),
    }
}

/// Names who has the port that a VXLAN device needs, in words.
fn port_holder(connection: &mut Connection, name: IfName, vxlan: &Vxlan) -> String {
    let (port, is_v6) = (vxlan.port, vxlan.local.is_some_and(|ip| ip.is_ipv6()));
    let devices = dump(connection).unwrap_or_default();
    let mut devices = devices
        .iter()
        .filter(|device| device.receives_on(port, is_v6));
    let other = devices.find_map(|device| device.name.filter(|other| *other != name));
    match other {
        Some(other) => format!("the VXLAN device {other}, which cannot share it"),
        None => udp_port_holder(port).unwrap_or_else(|| "something that cannot be told".to_owned()),
    }
}

/// Reads a device back: success of a request alone does not prove that it was carried out in full.
fn verify(connection: &mut Connection, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    let found = get(connection, link.name)
        .and_then(|device| device.map_or(Ok(None), |device| object(connection, &device)))
        .map_err(failed)?
        .ok_or_else(|| no_device(link.name))?;
    satisfies(&found, link).map_err(|why| Error::Rejected {
        message: format!("the kernel took it and made something else of it: its {why}"),
    })
}

/// A device as an object; the names of other devices are read if it is bound to one.
fn object(connection: &mut Connection, device: &Device) -> Result<Option<Link>, Failure> {
    let names = if device.has_link() {
        Names::read(connection)?
    } else {
        Names::default()
    };
    Ok(device.object(&names))
}

/// Alters a device in place.
pub(crate) fn change(connection: &mut Connection, names: &Names, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    let device = get(connection, link.name)
        .map_err(failed)?
        .ok_or_else(|| no_device(link.name))?;
    let found = device.object(names).ok_or_else(|| no_device(link.name))?;
    let bound_to = underlay_index(link, names)?;
    let fixed = |what: &str| {
        Err(Error::Unsupported {
            what: format!("changing {what} of {} in place", link.name),
        })
    };
    match (&found.kind, &link.kind) {
        (LinkKind::Vxlan(is), LinkKind::Vxlan(asked)) => {
            let family = |local: Option<IpAddr>| local.map(|ip| ip.is_ipv6());
            if is.vni != asked.vni {
                return fixed("the VNI");
            }
            if is.port != asked.port {
                return fixed("the port");
            }
            if is.gbp != asked.gbp {
                return fixed("the GBP flag");
            }
            if family(is.local) != family(asked.local) {
                return fixed("the family of the local address");
            }
            if asked.underlay.is_none() && device.has_link() {
                return fixed("the underlay device to none");
            }
            if is != asked {
                connection
                    .request(RTM_NEWLINK, 0, &alteration(device.index, asked, bound_to))
                    .map_err(failed)?;
            }
        }
        (LinkKind::Veth { .. }, LinkKind::Veth { peer: None }) => {}
        (LinkKind::Tun(is), LinkKind::Tun(asked)) if is.is_like(*asked) => {}
        (is, asked) if is == asked => {}
        (LinkKind::Veth { .. }, LinkKind::Veth { .. }) => return fixed("the other end"),
        _ => return fixed("the kind"),
    }
    let mut builder = LinkUnspec::new_with_index(device.index);
    let mut wanted = false;
    if let Some(mtu) = link.mtu.filter(|mtu| Some(*mtu) != found.mtu) {
        builder = builder.mtu(mtu);
        wanted = true;
    }
    if let Some(length) = queue(link).filter(|length| Some(*length) != queue(&found)) {
        builder = builder.append_extra_attribute(LinkAttribute::TxQueueLen(length));
        wanted = true;
    }
    if let Some(mac) = link.mac.filter(|mac| Some(*mac) != found.mac) {
        builder = builder.address(mac.0.to_vec());
        wanted = true;
    }
    if let Some(alias) = link.alias.as_ref().filter(|_| link.alias != found.alias) {
        builder = builder.alias(alias.clone());
        wanted = true;
    }
    if link.up != found.up {
        builder = if link.up {
            builder.up()
        } else {
            builder.down()
        };
        wanted = true;
    }
    if wanted {
        set(connection, link, &builder.build())?;
    }
    verify(connection, link)
}

/// Removes a device, unless what has its name now is of another kind, another VXLAN network or
/// bears another alias.
pub(crate) fn delete(connection: &mut Connection, names: &Names, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    let Some(device) = get(connection, link.name).map_err(failed)? else {
        return Ok(());
    };
    let Some(found) = device.object(names) else {
        return Ok(());
    };
    let same_kind = match (&found.kind, &link.kind) {
        (LinkKind::Vxlan(is), LinkKind::Vxlan(meant)) => is.vni == meant.vni,
        (LinkKind::Other(is), LinkKind::Other(meant)) => is == meant,
        (is, meant) => std::mem::discriminant(is) == std::mem::discriminant(meant),
    };
    if !same_kind || found.alias != link.alias {
        return Ok(());
    }
    match connection.request(RTM_DELLINK, 0, &by_index(&device)) {
        Err(failure) if failure.errno() == Some(Errno::ENODEV) => Ok(()),
        other => other.map_err(failed),
    }
}
