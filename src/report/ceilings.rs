//! The denominators of MBU and MFU: one bandwidth and one peak for all systems of a group.
//!
//! Every file has shares relative to its own process's measurements, which vary by a few percent between runs on one
//! machine. For comparison they are relative to the measurements of the reference's run, for the same model and
//! machine. On a CPU, other processes share the bandwidth, so the highest of any run in the group is used; torch's
//! product is not a peak there, since systems exceed it.

use super::input::{Group, ResultFile, SourceId};
use super::markdown::{cite, flops};
use crate::bench::model::{decode_bytes, prefill_flop};
use crate::bench::result::{Decode, Document, Peak, Prefill};
use crate::units::bytes;

pub struct Ceilings<'a> {
    on_gpu: bool,
    /// The common value, if there is one, and its source.
    bandwidth: Option<(f64, SourceId)>,
    peak: Option<(&'a Peak, SourceId)>,
}

impl<'a> Ceilings<'a> {
    pub fn of(group: &'a Group) -> Self {
        let bandwidth = |r: &ResultFile| Some((r.of.machine.copy_bandwidth_bytes_per_s?, r.source));
        let of_reference = group.reference.as_ref().and_then(bandwidth);
        let all = group.results.iter().chain(&group.ablations).chain(&group.reference);
        // The peak depends on the dtype, and a reference may be for several.
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

    /// The sentence below a table with MBU.
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

    /// The sentence below a table with MFU.
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
