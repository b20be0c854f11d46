//! Packet filters: the chains of nf_tables (`linux/netfilter/nf_tables.h`) that see forwarded
//! packets.
//!
//! Only chains are read, and of these what they do with a packet that none of their rules decides
//! on.

use flannel_core::{FilterChain, FilterFamily};

use crate::connection::Connection;
use crate::error::Failure;
use crate::wire::{Attributes, Body, Malformed, field_u8, read_text};

/// `NFNL_SUBSYS_NFTABLES` in the high byte.
const NFTABLES: u16 = 10 << 8;
const NFT_MSG_NEWCHAIN: u16 = NFTABLES | 3;
const NFT_MSG_GETCHAIN: u16 = NFTABLES | 4;

/// The length of `struct nfgenmsg`.
const HEADER: usize = 4;

/// Reads the chains at the hook of forwarded packets whose policy is to drop.
pub(crate) fn dropping(connection: &mut Connection) -> Result<Vec<FilterChain>, Failure> {
    let all_families = Body::new(&[0; HEADER]);
    let mut chains = connection.dump(NFT_MSG_GETCHAIN, &all_families, |message| {
        if message.kind != NFT_MSG_NEWCHAIN {
            return Ok(None);
        }
        Ok(decode(message.body)?)
    })?;
    chains.sort();
    Ok(chains)
}

/// Reads a chain; `None`: it does not see forwarded packets of IP, or does not drop them by policy.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub(crate) fn decode(body: &[u8]) -> Result<Option<FilterChain>, Malformed> {
    const NFTA_CHAIN_TABLE: u16 = 1;
    const NFTA_CHAIN_NAME: u16 = 3;
    const NFTA_CHAIN_HOOK: u16 = 4;
    const NFTA_CHAIN_POLICY: u16 = 5;
    const NFTA_HOOK_HOOKNUM: u16 = 1;
    const NF_INET_FORWARD: u32 = 2;
    const NF_DROP: u32 = 0;
    let (mut table, mut chain, mut hook, mut policy) = (String::new(), String::new(), None, None);
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            NFTA_CHAIN_TABLE => table = read_text(value),
            NFTA_CHAIN_NAME => chain = read_text(value),
            NFTA_CHAIN_POLICY => policy = Some(number(value)?),
            NFTA_CHAIN_HOOK => {
                for attribute in Attributes(value) {
                    let (kind, value) = attribute?;
                    if kind == NFTA_HOOK_HOOKNUM {
                        hook = Some(number(value)?);
                    }
                }
            }
            _ => {}
        }
    }
    /// `NFPROTO_INET`, `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    const FAMILIES: [(u8, FilterFamily); 3] = [
        (1, FilterFamily::Inet),
        (2, FilterFamily::Ip),
        (10, FilterFamily::Ip6),
    ];
    let number = field_u8(body, 0)?;
    let families = FAMILIES.into_iter().find(|(of, _)| *of == number);
    let drops = (hook, policy) == (Some(NF_INET_FORWARD), Some(NF_DROP));
    Ok(families.filter(|_| drops).map(|(_, families)| FilterChain {
        families,
        table,
        chain,
    }))
}

/// A number of four bytes in network byte order, as netfilter writes them.
fn number(value: &[u8]) -> Result<u32, Malformed> {
    let bytes = value.try_into();
    bytes
        .map(u32::from_be_bytes)
        .map_err(|_| Malformed("a 32-bit number of another length"))
}
