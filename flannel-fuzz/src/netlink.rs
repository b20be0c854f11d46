//! What the kernel sends: datagrams, messages of each kind, acknowledgements, ethtool's answers.

use std::collections::{BTreeMap, BTreeSet};

use flannel_core::kernel::{Error, Result};
use flannel_core::{Change, IfName, LinkKind, Object, Offload, Op};
use flannel_netlink::codec::{
    Batch, decode, decode_answer, decode_chain, decode_done, decode_events, decode_features,
    decode_rule, decode_way, encode, encode_offload,
};

/// The length of a message's header.
const HEADER: usize = 16;

/// The kinds of message that there is a codec for, and one that there is none for.
pub(crate) const KINDS: [u16; 11] = [16, 17, 20, 21, 24, 25, 28, 29, 104, 105, 3];

/// The devices that messages are about, by index: what the corpus was made with.
pub(crate) const DEVICES: [(u32, &str); 4] = [
    (1, "lo"),
    (2, "eth0"),
    (3, "flannel.1"),
    (4, "flannel-v6.1"),
];

fn devices() -> BTreeMap<u32, IfName> {
    let named = |(index, name): (u32, &str)| Some((index, IfName::new(name).ok()?));
    DEVICES.into_iter().filter_map(named).collect()
}

pub(crate) fn index(name: IfName) -> Result<u32> {
    DEVICES
        .iter()
        .find(|(_, known)| *known == name.as_str())
        .map(|(index, _)| *index)
        .ok_or_else(|| Error::NoSuchDevice {
            dev: name.to_string(),
        })
}

/// A datagram of the kernel.
pub(crate) fn datagram(bytes: &[u8]) -> bool {
    events(bytes);
    let Ok(objects) = decode(bytes, &devices()) else {
        return false;
    };
    assert!(objects.len() <= bytes.len() / HEADER, "objects of nothing");
    for object in &objects {
        returns(object);
    }
    true
}

/// One message: its kind by the first byte, then its body.
pub(crate) fn message(bytes: &[u8]) -> bool {
    let Some((kind, body)) = bytes.split_first() else {
        return false;
    };
    // What is asked of packets is read whatever kind it is.
    let _ = (decode_way(body), decode_rule(body), decode_chain(body));
    let kind = KINDS[usize::from(*kind) % KINDS.len()];
    let Ok(len) = u32::try_from(HEADER + body.len()) else {
        return false;
    };
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(len.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend([0; 10]);
    bytes.extend(body);
    datagram(&bytes)
}

/// What the watch makes of it: at most two notifications for each message, of a device that has
/// another name.
fn events(bytes: &[u8]) {
    if let Ok(hints) = decode_events(bytes) {
        assert!(hints.len() <= 2 * (bytes.len() / HEADER), "told of nothing");
        assert!(!hints.contains(&Change::All), "nothing was lost");
    }
}

/// An object that was decoded can be asked for, or is refused in words; what is asked for is read
/// as the object.
fn returns(object: &Object) {
    for op in [
        Op::Change(object.clone()),
        Op::Delete(object.clone()),
        Op::Create(object.clone()),
    ] {
        let mut batch = Batch::default();
        match encode(&op, None, index, &mut batch) {
            Ok(()) => {}
            Err(
                Error::Rejected { .. } | Error::Unsupported { .. } | Error::NoSuchDevice { .. },
            ) => continue,
            Err(error) => panic!("{} {object}: {error}", op.verb()),
        }
        assert_eq!(batch.len(), 1);
        let length = batch.bytes().get(..4).and_then(|len| len.try_into().ok());
        let length = length.map_or(0, u32::from_ne_bytes);
        assert!(usize::try_from(length).is_ok_and(|len| len <= batch.bytes().len()));
        let found = decode(batch.bytes(), &devices()).expect("our own request");
        match (op, &found[..]) {
            (Op::Delete(_), _) => {}
            (_, [found]) => assert_eq!(as_made(found), as_made(object)),
            (op, found) => panic!("{} {object}: {found:?}", op.verb()),
        }
    }
}

/// A device less what is set after it is made. The other end of a veth pair is made with it and has
/// no index yet.
fn as_made(object: &Object) -> Object {
    let mut object = object.clone();
    if let Object::Link(link) = &mut object {
        link.up = false;
        link.alias = None;
        if let LinkKind::Veth { peer } = &mut link.kind {
            *peer = None;
        }
    }
    object
}

/// An acknowledgement or the end of a dump: two bytes of flags, then the body.
pub(crate) fn answer(bytes: &[u8]) -> bool {
    let Some((flags, body)) = bytes.split_first_chunk() else {
        return false;
    };
    let flags = u16::from_ne_bytes(*flags);
    let answers = [decode_answer(flags, body), decode_done(flags, body)];
    for answer in answers.iter().flatten().flatten() {
        let (_, text) = answer;
        // What is no UTF-8 is replaced, which takes three bytes for one.
        let longest = 3 * body.len();
        assert!(text.as_ref().is_none_or(|text| text.len() <= longest));
    }
    // All zeros are good news.
    if body.len() >= 4 && body.iter().take(4).all(|byte| *byte == 0) {
        assert_eq!(answers, [Ok(None), Ok(None)]);
    }
    answers[0].is_ok()
}

/// ethtool's answer to the question for the features of a device.
pub(crate) fn ethtool(bytes: &[u8]) -> bool {
    let Ok(features) = decode_features(bytes) else {
        return false;
    };
    assert!(features.len() <= bytes.len() / 4, "features of nothing");
    for name in features.keys().filter(|name| name.len() <= 256) {
        assert!(!name.contains('\0'), "{name:?}");
        for on in [false, true] {
            let (_, dev) = DEVICES[1];
            let mut batch = Batch::default();
            let offload = Offload {
                dev: IfName::new(dev).expect("a device name"),
                feature: name.clone(),
                on,
            };
            encode_offload(&offload, &mut batch);
            // It is a list of names like the kernel's own.
            let body = batch.bytes().get(HEADER..).unwrap_or_default();
            let asked = decode_features(body).expect("our own request");
            let names: BTreeSet<_> = asked.keys().collect();
            assert_eq!(names, [name].into());
        }
    }
    true
}
