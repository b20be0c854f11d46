//! What a VXLAN node publishes with its lease.

use std::fmt;

use flannel_core::{BackendData, BackendDataError, MacAddr};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The backend data of a VXLAN lease: `{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`, per family.
///
/// Written exactly as flannel writes it, `VtepMAC` last: Go flannel finds its own old MAC again by
/// cutting this text. Read as flannel reads it: keys in any case and order, unknown ones ignored,
/// the last of two wins, and a MAC in any six-byte form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VxlanData {
    /// The VXLAN network identifier of the node; 0 if the record names none.
    #[serde(rename = "VNI")]
    pub vni: u32,
    /// The MAC address of the node's end of the overlay.
    #[serde(rename = "VtepMAC")]
    pub vtep_mac: MacAddr,
}

impl VxlanData {
    /// Reads backend data.
    ///
    /// # Errors
    /// [`BackendDataError::Malformed`] if it is not of this form or the MAC address is not one that
    /// a single device can have.
    pub fn decode(data: &BackendData) -> Result<Self, BackendDataError> {
        data.decode()
    }

    /// The data as published.
    ///
    /// # Errors
    /// Never in practice: the form is short and valid.
    pub fn encode(&self) -> Result<BackendData, BackendDataError> {
        BackendData::encode(self)
    }
}

impl<'de> Deserialize<'de> for VxlanData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = VxlanData;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with VNI and VtepMAC")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<VxlanData, A::Error> {
                let (mut vni, mut mac) = (0, None);
                while let Some(key) = map.next_key::<String>()? {
                    if key.eq_ignore_ascii_case("VNI") {
                        vni = map.next_value::<Option<u32>>()?.unwrap_or(vni);
                    } else if key.eq_ignore_ascii_case("VtepMAC") {
                        mac = map.next_value::<Option<MacAddr>>()?.or(mac);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                let vtep_mac = mac.ok_or_else(|| serde::de::Error::missing_field("VtepMAC"))?;
                if !vtep_mac.is_unicast() {
                    return Err(serde::de::Error::custom(format!(
                        "VtepMAC {vtep_mac} is not the address of a single device"
                    )));
                }
                Ok(VxlanData { vni, vtep_mac })
            }
        }

        deserializer.deserialize_map(Fields)
    }
}
