//! [`Names`]: the devices of the namespace, by name and by index.

use std::collections::BTreeMap;

use flannel_core::IfName;
use flannel_core::kernel::Error;

use crate::connection::Connection;
use crate::error::{Failure, no_device};
use crate::link::{self, Device};

/// The devices as one dump showed them. An index that was deleted since is refused by the kernel
/// (`ENODEV`), and the kernel gives a free index out again only after all others.
#[derive(Debug, Default)]
pub(crate) struct Names {
    by_name: BTreeMap<IfName, u32>,
    by_index: BTreeMap<u32, Option<IfName>>,
}

/// The device that an object of a dump is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Named {
    /// This one.
    Device(IfName),
    /// One whose name is no [`IfName`], so that nothing can be said of what is on it.
    Unspeakable,
    /// One that was made after the devices were read.
    Unknown,
}

impl Names {
    pub(crate) fn of<'a>(devices: impl IntoIterator<Item = &'a Device>) -> Self {
        let mut names = Self::default();
        for device in devices {
            names.by_index.insert(device.index, device.name);
            if let Some(name) = device.name {
                names.by_name.insert(name, device.index);
            }
        }
        names
    }

    /// The devices of a map.
    pub(crate) fn from_map(devices: &BTreeMap<u32, IfName>) -> Self {
        Self {
            by_name: devices
                .iter()
                .map(|(index, name)| (*name, *index))
                .collect(),
            by_index: devices
                .iter()
                .map(|(index, name)| (*index, Some(*name)))
                .collect(),
        }
    }

    pub(crate) fn read(connection: &mut Connection) -> Result<Self, Failure> {
        Ok(Self::of(&link::dump(connection)?))
    }

    /// Learns of one device, whether it is there; of the others nothing is known.
    pub(crate) fn learn(
        &mut self,
        connection: &mut Connection,
        name: IfName,
    ) -> Result<(), Failure> {
        if let Some(device) = link::get(connection, name)? {
            self.by_index.insert(device.index, Some(name));
            self.by_name.insert(name, device.index);
        }
        Ok(())
    }

    /// The same of one by its index.
    pub(crate) fn learn_index(
        &mut self,
        connection: &mut Connection,
        index: u32,
    ) -> Result<(), Failure> {
        if self.by_index.contains_key(&index) {
            return Ok(());
        }
        if let Some(device) = link::get_by_index(connection, index)? {
            self.by_index.insert(device.index, device.name);
            if let Some(name) = device.name {
                self.by_name.insert(name, device.index);
            }
        }
        Ok(())
    }

    /// The index of a device.
    pub(crate) fn index(&self, name: IfName) -> Result<u32, Error> {
        self.by_name
            .get(&name)
            .copied()
            .ok_or_else(|| no_device(name))
    }

    /// The device with an index.
    pub(crate) fn name(&self, index: u32) -> Named {
        match self.by_index.get(&index) {
            Some(Some(name)) => Named::Device(*name),
            Some(None) => Named::Unspeakable,
            None => Named::Unknown,
        }
    }

    /// The name of the device with an index, if it can be told.
    pub(crate) fn get(&self, index: u32) -> Option<IfName> {
        self.by_index.get(&index).copied().flatten()
    }
}
