//! The sizes of an adapter's sites as the registry keeps them: what a device needs is known without opening a file.
//!
//! ```text
//! 1 byte    version, 1
//! per site, little-endian:
//!   4  layer      1  module (the code of docs/generation.md)      1  flags: 1 B has a bias, 2 DoRA
//!   4  rank       4  columns of A                                  4  rows of B
//! ```

use openlora_types::{AdapterSizes, Site, SiteSize};

use crate::weights::{module_code, module_of};

const VERSION: u8 = 1;
const SITE_BYTES: usize = 18;

pub(crate) fn encode(sizes: &AdapterSizes) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + sizes.sites.len() * SITE_BYTES);
    bytes.push(VERSION);
    for size in &sizes.sites {
        bytes.extend_from_slice(&size.site.layer.to_le_bytes());
        bytes.push(module_code(size.site.module));
        bytes.push(u8::from(size.b_bias) | u8::from(size.dora) << 1);
        // Sizes were checked against the base model's, which fit 32 bits.
        for size in [size.rank, size.inputs, size.outputs] {
            bytes.extend_from_slice(&(size as u32).to_le_bytes());
        }
    }
    bytes
}

/// `None` for bytes that [`encode`] does not write.
pub(crate) fn decode(bytes: &[u8]) -> Option<AdapterSizes> {
    let (&version, sites) = bytes.split_first()?;
    let (sites, rest) = sites.as_chunks::<SITE_BYTES>();
    if version != VERSION || !rest.is_empty() {
        return None;
    }
    Some(AdapterSizes { sites: sites.iter().map(site).collect::<Option<_>>()? })
}

fn site(bytes: &[u8; SITE_BYTES]) -> Option<SiteSize> {
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Some(SiteSize {
        site: Site { layer: number(0), module: module_of(bytes[4])? },
        rank: number(6) as usize,
        inputs: number(10) as usize,
        outputs: number(14) as usize,
        b_bias: bytes[5] & 1 != 0,
        dora: bytes[5] & 2 != 0,
    })
}

#[cfg(test)]
mod tests {
    use openlora_types::Module;

    use super::*;

    #[test]
    fn sizes_are_read_as_they_were_written_and_nothing_else_is() {
        let site = |layer, module, rank, (b_bias, dora)| SiteSize {
            site: Site { layer, module },
            rank,
            inputs: 1 << 20,
            outputs: 7,
            b_bias,
            dora,
        };
        let sites = vec![
            site(0, Module::Q, 1, (false, false)),
            site(29, Module::Down, 256, (true, false)),
            site(1_023, Module::LmHead, 13, (false, true)),
        ];
        let sizes = AdapterSizes { sites };
        let bytes = encode(&sizes);
        assert_eq!(decode(&bytes), Some(sizes));
        assert_eq!(decode(&[VERSION]), Some(AdapterSizes::default()));
        let (mut newer, mut module) = (bytes.clone(), bytes.clone());
        (newer[0], module[5]) = (2, 200);
        for wrong in [&[][..], &bytes[..bytes.len() - 1], &newer, &module] {
            assert_eq!(decode(wrong), None);
        }
    }
}
