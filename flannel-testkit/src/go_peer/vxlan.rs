//! What the VXLAN backend of Go flannel does with a lease (facts 7.1 and 13, weaknesses B3).

use flannel_core::Subnet;

use super::record::{GoLease, Members};

/// The families that a Go node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoMode {
    /// IPv4 alone.
    V4,
    /// Both.
    Dual,
}

/// What comes of a lease that is added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    /// Routes to these subnets; perhaps not to all that it names, and then why.
    Routes(Vec<Subnet>, Option<String>),
    /// The process ends.
    Crash(String),
}

/// What a node of a mode does with a lease.
pub(super) fn effect(mode: GoMode, lease: &GoLease) -> Effect {
    let nothing = |why: String| Effect::Routes(Vec::new(), Some(why));
    let attrs = &lease.attrs;
    if attrs.backend_type != "vxlan" {
        return nothing(format!("its backend is {:?}", attrs.backend_type));
    }
    let mac4 = match vtep_mac(attrs.backend_data.v4.as_deref()) {
        Ok(len) => len,
        Err(why) => return nothing(format!("BackendData: {why}")),
    };
    let mut mac6 = None;
    if lease.v6.is_some() {
        if mode == GoMode::V4 {
            let why = "it has an IPv6 half and this node no IPv6 device";
            return Effect::Crash(why.to_owned());
        }
        match vtep_mac(attrs.backend_data.v6.as_deref()) {
            Ok(len) => mac6 = Some(len),
            Err(why) => return nothing(format!("BackendV6Data: {why}")),
        }
        if attrs.public_ipv6.is_none() {
            return Effect::Crash("it has BackendV6Data and no PublicIPv6".to_owned());
        }
    }
    // The kernel refuses what follows for the length of the address or for host bits; what came
    // before stays.
    let mut routes = Vec::new();
    let halves = [
        Some((mac4, lease.v4.destination())),
        mac6.map(|mac| (mac, lease.v6.and_then(|v6| v6.destination()))),
    ];
    for (mac, destination) in halves.into_iter().flatten() {
        match destination {
            Some(subnet) if mac == 6 => routes.push(subnet),
            Some(_) => {
                let why = format!("the kernel refuses a VtepMAC of {mac} bytes");
                return Effect::Routes(routes, Some(why));
            }
            None => {
                let why = "the kernel refuses a route with host bits";
                return Effect::Routes(routes, Some(why.to_owned()));
            }
        }
    }
    Effect::Routes(routes, None)
}

/// The length of the MAC address in backend data; 0 if it names none.
fn vtep_mac(data: Option<&str>) -> Result<usize, String> {
    let data = data.ok_or("there is none")?;
    let members: Members = serde_json::from_str(data).map_err(|error| error.to_string())?;
    let mut len = 0;
    for (name, json) in members.0 {
        let json = json.get();
        if name.eq_ignore_ascii_case("VNI") {
            let vni: Result<Option<u32>, _> = serde_json::from_str(json);
            vni.map_err(|_| format!("VNI is {json}"))?;
        } else if name.eq_ignore_ascii_case("VtepMAC") {
            let text = json
                .strip_prefix('"')
                .and_then(|text| text.strip_suffix('"'));
            let mac = text.and_then(mac_len);
            len = mac.ok_or_else(|| format!("VtepMAC is {json}"))?;
        }
    }
    Ok(len)
}

/// The number of bytes of a hardware address in one of the forms that Go parses.
fn mac_len(text: &str) -> Option<usize> {
    let hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit())
    };
    let (separator, digits) = match text.bytes().find(|b| !b.is_ascii_hexdigit())? {
        b':' => (':', 2),
        b'-' => ('-', 2),
        b'.' => ('.', 4),
        _ => return None,
    };
    if !text.split(separator).all(|part| hex(part, digits)) {
        return None;
    }
    let len = text.split(separator).count() * digits / 2;
    matches!(len, 6 | 8 | 20).then_some(len)
}
