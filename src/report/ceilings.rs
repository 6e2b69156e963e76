//! What MBU and MFU are shares of: one bandwidth and one peak for all systems of a group.
//!
//! Every file has shares of what its own process measured, which differs by a few percent from run to run of one machine.
//! Side by side they are of what the reference's run measured, which is of the same model and machine. The bandwidth of a
//! CPU is shared with neighbors who come and go: there it is the highest that any run of the group saw, and a product in
//! torch, which systems here outran, is no peak.

use super::input::{Group, ResultFile, SourceId};
use super::markdown::{cite, flops};
use crate::bench::model::{decode_bytes, prefill_flop};
use crate::bench::result::{Decode, Document, Peak, Prefill};
use crate::units::bytes;

pub struct Ceilings<'a> {
    on_gpu: bool,
    /// For all, where there is one, and who measured it.
    bandwidth: Option<(f64, SourceId)>,
    peak: Option<(&'a Peak, SourceId)>,
}

impl<'a> Ceilings<'a> {
    pub fn of(group: &'a Group) -> Self {
        let bandwidth = |r: &ResultFile| Some((r.of.machine.copy_bandwidth_bytes_per_s?, r.source));
        let of_reference = group.reference.as_ref().and_then(bandwidth);
        let all = group.results.iter().chain(&group.ablations).chain(&group.reference);
        // The peak is another in another dtype, and a reference may have been made for several.
        let fits = |(peak, _): &(&Peak, SourceId)| group.on_gpu && peak.source.contains(&group.dtype);
        let peak = |r: &'a ResultFile| Some((r.of.machine.peak_flops.as_ref()?, r.source));
        Ceilings {
            on_gpu: group.on_gpu,
            bandwidth: match group.on_gpu {
                true => of_reference,
                false => all.filter_map(bandwidth).max_by(|a, b| a.0.total_cmp(&b.0)),
            },
            peak: group.reference.as_ref().and_then(peak).filter(fits),
        }
    }

    /// Bytes a second.
    pub fn bandwidth(&self, d: &Document) -> Option<f64> {
        self.bandwidth.map(|(n, _)| n).or(d.machine.copy_bandwidth_bytes_per_s)
    }

    /// Operations a second.
    pub fn peak(&self, d: &Document) -> Option<f64> {
        let own = d.machine.peak_flops.as_ref();
        Some(self.peak.map(|(peak, _)| peak).or(own)?.flops)
    }

    pub fn mbu(&self, d: &Document, m: &Decode) -> Option<f64> {
        let read = decode_bytes(&d.model, m.live * d.workload.batch.max(1));
        Some(read / (m.ms.median / 1e3) / self.bandwidth(d)?)
    }

    pub fn mfu(&self, d: &Document, m: &Prefill) -> Option<f64> {
        let done = prefill_flop(&d.model, m.tokens)? * d.workload.batch.max(1) as f64;
        Some(done / (m.ms.median / 1e3) / self.peak(d)?)
    }

    /// A sentence for below a table with MBU.
    pub fn bandwidth_note(&self) -> String {
        let Some((n, source)) = self.bandwidth else {
            return "MBU is of the copy bandwidth that each run measured itself.".to_string();
        };
        let whose = match self.on_gpu {
            true => "the copy bandwidth that the reference's run measured",
            false => "the highest copy bandwidth that a run here measured",
        };
        format!(
            "MBU is of {}/s for every system: {whose}.{}",
            bytes(n as u64),
            cite(source)
        )
    }

    /// A sentence for below a table with MFU.
    pub fn peak_note(&self) -> String {
        match self.peak {
            Some((peak, source)) => format!(
                "MFU is of {} for every system, which the reference's run has as its peak ({}).{}",
                flops(peak.flops),
                peak.source,
                cite(source)
            ),
            None => "MFU is of the peak that each run has itself.".to_string(),
        }
    }
}
