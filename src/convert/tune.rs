//! Chooses the lowering of every engine by measurements on the GPU of this machine.

use super::{ConvertError, Progress, engines};
use crate::backend::tensorrt::Library;
use crate::backend::tensorrt::run::Runtime;
use crate::network::Profile;
use crate::package::Writer;
use crate::spec::Conversion;
use crate::tune::Attempt;
use crate::tune::measure::{TuneError, tune as measure};

/// Refuses a machine that cannot measure, before any work is done.
pub(super) fn check(library: &Library) -> Result<(), ConvertError> {
    Runtime::new(library).map(|_| ()).map_err(ConvertError::TuneGpu)
}

/// Measures, and stores the winners in the conversion and the figures in the package.
pub(super) fn tune(
    writer: &mut Writer,
    library: &Library,
    conversion: &mut Conversion,
    capacities: &[usize],
    progress: &dyn Progress,
) -> Result<(), ConvertError> {
    let graph = engines::graph(&writer.package(), conversion)?;
    let mut profiles = engines::profiles(conversion, capacities);
    // Steps of several sequences use only kernels: there is nothing to choose.
    profiles.retain(|profile| profile.batch == 1);
    progress.step("tuning");
    // There are few attempts, and each takes long: every one gets a line.
    let note = |profile: &Profile, attempt: &Attempt| {
        let result = match (&attempt.ms, &attempt.error) {
            (Some(ms), _) => format!("{ms:.3} ms"),
            (None, error) => error.as_deref().unwrap_or("not measured").to_string(),
        };
        progress.note(&format!("{profile} {}: {result}", attempt.what));
    };
    let tuning = measure(
        library,
        &graph,
        &profiles,
        (&conversion.lowering, conversion.refit),
        engines::at_once(conversion.weights),
        note,
    );
    let tuning = tuning.map_err(|error| match error {
        TuneError::Gpu(error) => ConvertError::TuneGpu(error),
        other => ConvertError::Tune(other),
    })?;
    for profile in &tuning.profiles {
        progress.note(&format!(
            "{}: {:.3} ms, {:.3} untuned",
            profile.profile, profile.ms, profile.untuned_ms
        ));
    }
    conversion.tuned = tuning.tuned();
    writer.tuning(tuning);
    Ok(())
}
