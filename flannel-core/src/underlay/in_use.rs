//! [`InUse`]: the external interface is kept for as long as it can carry the overlay, whatever looks
//! better meanwhile.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Error, External, Underlay, UnderlayOptions, devices};
use crate::clock::Moment;
use crate::family::{Family, PublicIp};
use crate::object::IfName;

/// The time that an interface may be without its address before another address of it is taken: a
/// DHCP client removes the old one before it sets the new one.
const NEW_ADDRESS: Duration = Duration::from_millis(500);

/// The time that the interface in use may be lost before another one is taken: a restart of the
/// host's network takes seconds.
const ANOTHER: Duration = Duration::from_secs(3);

/// The time that a family may be without an address on the interface before the overlay goes on
/// without it: a host that boots gets its IPv6 addresses later.
const WITHOUT_FAMILY: Duration = Duration::from_secs(10);

/// The most peers of whom it is looked whether they are reached through the interface.
pub(crate) const SAMPLE: usize = 16;

/// The interface in use, as far as a restart needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedInterface {
    /// The device.
    pub dev: IfName,
    /// Its index, which another device may have after a boot.
    pub index: u32,
    /// The other devices of the default route that it was chosen by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<IfName>,
    /// The addresses that outer packets are sent from.
    pub local: PublicIp,
    /// The options that the interface was chosen by, in words.
    pub asked: String,
}

/// Why the interface in use cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lost {
    /// It does not exist any more, nor does its address elsewhere.
    Gone { dev: IfName },
    /// It is administratively down.
    Down { dev: IfName },
    /// It has lost its address, or may not use it for anything new.
    Address { dev: IfName, ip: Option<IpAddr> },
    /// The kernel sends to peers through another one.
    Rerouted { dev: IfName, to: IfName },
    /// It has a form that it cannot be used in.
    Unfit { dev: IfName, why: String },
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone { dev } => write!(f, "{dev} is gone"),
            Self::Down { dev } => write!(f, "{dev} is down"),
            Self::Address { dev, ip: Some(ip) } => {
                write!(f, "{dev} has the address {ip} no more, or may not use it")
            }
            Self::Address { dev, ip: None } => write!(f, "{dev} has no address"),
            Self::Rerouted { dev, to } => {
                write!(
                    f,
                    "the host's routes to peers lead through {to}, none through {dev}"
                )
            }
            Self::Unfit { dev, why } => write!(f, "{dev} cannot be used: {why}"),
        }
    }
}

/// The fate of the interface in use.
#[derive(Debug)]
pub(crate) enum Found {
    /// It is this, perhaps since now.
    Is {
        external: Box<External>,
        /// The families that do without it, and why.
        lacking: Vec<(Family, Error)>,
        /// It is another one than before, for this reason.
        moved: Option<(Box<External>, String)>,
    },
    /// It is lost, and another one may be taken later.
    Waits { lost: Lost, until: Moment },
    /// There is none.
    None(Error),
}

/// The interface in use.
#[derive(Debug)]
pub(crate) struct InUse {
    options: UnderlayOptions,
    external: Option<External>,
    /// The interface comes from the saved state and has not been seen in this run.
    is_remembered: bool,
    lost_since: Option<Moment>,
    /// When a family was first found without an address.
    lacking_since: Option<Moment>,
    /// When to look again although nothing has changed.
    look_at: Option<Moment>,
}

impl InUse {
    /// None yet; options say which one it is to be.
    pub(crate) const fn new(options: UnderlayOptions) -> Self {
        Self {
            options,
            external: None,
            is_remembered: false,
            lost_since: None,
            lacking_since: None,
            look_at: None,
        }
    }

    /// The one of an earlier run, if it was asked for in the same words.
    pub(crate) fn remember(&mut self, saved: &SavedInterface) {
        if self.external.is_none() && saved.asked == self.options.to_string() {
            self.is_remembered = true;
            self.external = Some(External {
                dev: saved.dev,
                index: saved.index,
                others: saved.others.clone(),
                mtu: 0,
                local: saved.local,
                public: PublicIp::default(),
                reason: "it was in use before".to_owned(),
            });
        }
    }

    /// The part that a restart needs.
    pub(crate) fn to_save(&self) -> Option<SavedInterface> {
        let external = self.external.as_ref()?;
        Some(SavedInterface {
            dev: external.dev,
            index: external.index,
            others: external.others.clone(),
            local: external.local,
            asked: self.options.to_string(),
        })
    }

    /// The options that it is chosen by.
    pub(crate) const fn options(&self) -> &UnderlayOptions {
        &self.options
    }

    /// When to look again although nothing has changed.
    pub(crate) const fn look_at(&self) -> Option<Moment> {
        self.look_at
    }

    /// Takes the interface that somebody names, at once. Nothing changes if there is none.
    ///
    /// # Errors
    /// [`Error`] says why there is none.
    pub(crate) fn take(
        &mut self,
        options: UnderlayOptions,
        underlay: &Underlay,
        families: &[Family],
    ) -> Result<Found, Error> {
        let (external, lacking) = underlay.choose_some(&options, families)?;
        self.options = options;
        Ok(self.is(external, lacking, "another one was asked for"))
    }

    /// The interface that a network of these families would have.
    ///
    /// # Errors
    /// [`Error`] says why there is none.
    pub(crate) fn preview(
        &self,
        underlay: &Underlay,
        families: &[Family],
    ) -> Result<External, Error> {
        let kept = self.external.as_ref();
        let kept = kept.and_then(|old| underlay.keep(old, &self.options, families, &[], true).ok());
        match kept {
            Some(kept) => Ok(kept.external),
            None => Ok(underlay.choose_some(&self.options, families)?.0),
        }
    }

    /// Looks what became of it. `sample` are addresses of peers, at most [`SAMPLE`] of them.
    pub(crate) fn look(
        &mut self,
        underlay: &Underlay,
        families: &[Family],
        sample: &[IpAddr],
        now: Moment,
    ) -> Found {
        self.look_at = None;
        let lost = match &self.external {
            None => None,
            Some(external) => match underlay.keep(external, &self.options, families, sample, false)
            {
                Ok(kept) => return self.keeps(kept, now),
                Err(lost) => Some(lost),
            },
        };
        let since = *self.lost_since.get_or_insert(now);
        let mut chosen = underlay.choose_some(&self.options, families);
        if let Some(old) = &self.external
            && (chosen.is_err() || self.may_have_another_address(lost.as_ref()))
            && let Ok(again) = underlay.again(old, &self.options, families)
        {
            chosen = Ok((again, Vec::new()));
        }
        let Some(lost) = lost else {
            return self.first(chosen, since, now);
        };
        let wait = match (&self.external, &chosen) {
            (Some(old), Ok((new, _))) if is_same(old, new) => Duration::ZERO,
            (Some(old), Ok((new, _))) if old.index == new.index => NEW_ADDRESS,
            _ => ANOTHER,
        };
        if now < since + wait {
            let until = since + wait;
            self.look_at = Some(until);
            return Found::Waits { lost, until };
        }
        match (chosen, &self.external) {
            (Ok((external, lacking)), _) => self.is(external, lacking, &lost.to_string()),
            (Err(error), Some(old)) => {
                match underlay.keep(old, &self.options, families, sample, true) {
                    Ok(kept) => self.keeps(kept, now),
                    Err(_) => Found::None(error),
                }
            }
            (Err(error), None) => Found::None(error),
        }
    }

    /// Tells if another address of the interface comes before another interface, however good that one
    /// looks: nobody asked for any, and it has only lost its own.
    const fn may_have_another_address(&self, lost: Option<&Lost>) -> bool {
        let is_free = self.options.interfaces.is_empty();
        is_free && matches!(lost, Some(Lost::Address { .. }))
    }

    /// Takes the first one, if it is complete, or has been incomplete for long.
    fn first(
        &mut self,
        chosen: Result<(External, Vec<(Family, Error)>), Error>,
        since: Moment,
        now: Moment,
    ) -> Found {
        match chosen {
            Err(error) => Found::None(error),
            Ok((external, lacking)) => match lacking.first() {
                Some((_, error)) if now < since + WITHOUT_FAMILY => {
                    self.look_at = Some(since + WITHOUT_FAMILY);
                    Found::None(error.clone())
                }
                _ => self.is(external, lacking, ""),
            },
        }
    }

    /// Goes on with the one in use. A family that has just lost its address keeps it for a while: a
    /// link that is set down loses its IPv6 addresses, and gets them back when it is up again.
    fn keeps(&mut self, kept: Kept, now: Moment) -> Found {
        let Kept {
            mut external,
            lacking,
            why,
        } = kept;
        if lacking.is_empty() {
            self.lacking_since = None;
        } else {
            let until = *self.lacking_since.get_or_insert(now) + WITHOUT_FAMILY;
            if now < until {
                self.look_at = Some(until);
                for (family, _) in &lacking {
                    let old = self.external.as_ref();
                    if let Some(ip) = old.and_then(|old| old.local.ip(*family)) {
                        external.local.set_ip(ip);
                    }
                    if let Some(ip) = old.and_then(|old| old.public.ip(*family)) {
                        external.public.set_ip(ip);
                    }
                }
            }
        }
        self.is(external, lacking, &why)
    }

    fn is(&mut self, external: External, lacking: Vec<(Family, Error)>, why: &str) -> Found {
        self.lost_since = None;
        let former = self.external.replace(external.clone());
        let former = former.filter(|former| {
            !self.is_remembered && (former.dev != external.dev || former.local != external.local)
        });
        self.is_remembered = false;
        Found::Is {
            external: Box::new(external),
            lacking,
            moved: former.map(|former| (Box::new(former), why.to_owned())),
        }
    }
}

/// An interface that is kept.
#[derive(Debug)]
struct Kept {
    external: External,
    /// The families that have no address on it, and why.
    lacking: Vec<(Family, Error)>,
    /// Why it is called otherwise than before, if it is.
    why: String,
}

fn is_same(old: &External, new: &External) -> bool {
    old.index == new.index && old.local == new.local
}

impl Underlay {
    /// The interface in use as it is now, if it can be kept; `at_any_cost`: also with an address that
    /// may not be used for anything new.
    fn keep(
        &self,
        old: &External,
        options: &UnderlayOptions,
        families: &[Family],
        sample: &[IpAddr],
        at_any_cost: bool,
    ) -> Result<Kept, Lost> {
        let dev = self.whereabouts(old)?;
        let link = self.link(dev).ok_or(Lost::Gone { dev })?;
        if !link.up {
            return Err(Lost::Down { dev });
        }
        if let Some(to) = self.rerouted(dev, old, sample) {
            return Err(Lost::Rerouted { dev, to });
        }
        let mut lacking = Vec::new();
        let mut local = PublicIp::default();
        let mut works = Vec::new();
        for family in families {
            let before = old.local.ip(*family);
            if let Some(ip) = before.filter(|ip| self.is_usable(*ip, at_any_cost)) {
                local.set_ip(ip);
                works.push(*family);
                continue;
            }
            let asked = self.external(&[dev], local, options, &[*family], String::new());
            match asked {
                Ok(found) => {
                    if let Some(ip) = found.local.ip(*family) {
                        local.set_ip(ip);
                    }
                    works.push(*family);
                }
                Err(error) => lacking.push((*family, error)),
            }
        }
        // Another address of the only family is another choice.
        let is_new =
            |family: &Family| old.local.has(*family) && local.ip(*family) != old.local.ip(*family);
        if works.is_empty() || works.iter().all(is_new) {
            let ip = old.local.ips().next();
            return Err(Lost::Address { dev, ip });
        }
        let mut devs = vec![dev];
        let others = old.others.iter().copied();
        devs.extend(others.filter(|other| *other != dev && self.link(*other).is_some()));
        let reason = old.reason.clone();
        let external = self.external(&devs, local, options, &works, reason);
        let external = external.map_err(|error| Lost::Unfit {
            dev,
            why: error.to_string(),
        })?;
        let why = if link.index == old.index {
            format!("{} was renamed", old.dev)
        } else {
            format!("the address moved to {dev}")
        };
        Ok(Kept {
            external,
            lacking,
            why,
        })
    }

    /// The interface in use with whatever addresses it has now: the routes through it come back after
    /// its address.
    fn again(
        &self,
        old: &External,
        options: &UnderlayOptions,
        families: &[Family],
    ) -> Result<External, Error> {
        let gone = Error::NoSuchInterface { name: old.dev };
        let mut links = self.links.iter();
        let link = links.find(|link| link.index == old.index && link.up);
        let dev = link.ok_or(gone)?.name;
        let reason = old.reason.clone();
        self.external(&[dev], PublicIp::default(), options, families, reason)
    }

    /// The device that the interface in use is now: it, under whatever name, as long as it has the
    /// address; else the one that has: the bridge or bond that it became a port of, or itself, made
    /// again.
    fn whereabouts(&self, old: &External) -> Result<IfName, Lost> {
        let by_index = self.links.iter().find(|link| link.index == old.index);
        let locals: Vec<IpAddr> = old.local.ips().collect();
        let has = |dev: IfName| {
            let mut addresses = self.addresses.iter();
            addresses.any(|address| address.dev == dev && locals.contains(&address.ip))
        };
        let is_elsewhere = |dev: IfName| {
            self.links
                .iter()
                .any(|link| link.name == dev && link.loopback)
        };
        let holders = || {
            let holds = |address: &&super::AddressInfo| locals.contains(&address.ip);
            self.addresses
                .iter()
                .filter(holds)
                .map(|address| address.dev)
        };
        let by_name = self.link(old.dev);
        match by_index.or(by_name) {
            // Addresses of the loopback device are sent from through any.
            Some(link) if locals.is_empty() || has(link.name) || holders().any(is_elsewhere) => {
                Ok(link.name)
            }
            link => match holders().find(|dev| !is_elsewhere(*dev)) {
                Some(dev) => Ok(dev),
                None => Err(match link {
                    Some(link) if !link.up => Lost::Down { dev: link.name },
                    Some(link) => Lost::Address {
                        dev: link.name,
                        ip: locals.first().copied(),
                    },
                    None => Lost::Gone { dev: old.dev },
                }),
            },
        }
    }

    /// Another device through which the kernel sends to peers, if it sends to none through this one.
    fn rerouted(&self, dev: IfName, old: &External, sample: &[IpAddr]) -> Option<IfName> {
        let mut elsewhere = None;
        for ip in sample.iter().take(SAMPLE) {
            let Some(route) = self.route_to(*ip) else {
                continue;
            };
            for to in devices(&route.target) {
                if to == dev || to == old.dev || old.others.contains(&to) {
                    return None;
                }
                elsewhere = elsewhere.or(Some(to));
            }
        }
        elsewhere.filter(|to| !self.inward.contains(to))
    }

    /// Tells if the host has an address and may use it: for something new, or if it is all that there
    /// is.
    fn is_usable(&self, ip: IpAddr, at_any_cost: bool) -> bool {
        let mut addresses = self.addresses.iter().filter(|address| address.ip == ip);
        addresses.any(|address| !address.tentative && (at_any_cost || !address.deprecated))
    }
}
