//! Scratch memory: one buffer for all engines, since only one runs at a time, with the size of the largest requirement.

use super::CudaDevice;
use super::chunks::covers;
use crate::backend::tensorrt::run::{Buffer, Program, RunError};

impl CudaDevice {
    /// Binds the program to the common scratch memory, which is first enlarged if necessary.
    pub(super) fn share_scratch(&mut self, program: &mut Program) -> Result<(), RunError> {
        self.provide_scratch(program.scratch_bytes())?;
        // SAFETY: stored in self until every loaded engine has another one or is dropped (`allocate_scratch`,
        // `unload`); the device runs one engine at a time.
        unsafe { program.set_scratch(self.scratch.as_ref().expect("just provided")) };
        Ok(())
    }

    /// Scratch memory of at least this many bytes for every loaded engine. After an error the previous memory stays.
    pub(super) fn provide_scratch(&mut self, bytes: usize) -> Result<(), RunError> {
        let had = self.scratch.as_ref().map(Buffer::bytes);
        if had.is_some_and(|had| had >= bytes) {
            return Ok(());
        }
        // The smaller one is freed first: both at once could need more memory than is free.
        self.stream.wait()?;
        self.scratch = None;
        self.allocate_scratch(bytes).map_err(|error| {
            let fits = self.loaded_capacity();
            if had.is_some_and(|had| self.allocate_scratch(had).is_err()) {
                // Another process took the memory that was briefly free. Without scratch memory nothing can run.
                self.unload();
            }
            match error {
                RunError::Memory { what, needed, free, .. } => RunError::Memory {
                    what,
                    needed,
                    free,
                    fits,
                },
                other => other,
            }
        })
    }

    /// Frees what no loaded engine needs any more. After an error nothing is loaded.
    pub(super) fn trim_scratch(&mut self) -> Result<(), RunError> {
        let loaded = self.slots.iter().filter_map(|slot| slot.loaded.as_ref());
        let needed = loaded.map(|loaded| loaded.program.scratch_bytes()).max();
        if self.scratch.as_ref().map(Buffer::bytes) <= needed {
            return Ok(());
        }
        self.stream.wait()?;
        self.scratch = None;
        match needed {
            // As above: engines must not keep freed memory.
            Some(bytes) => self.allocate_scratch(bytes).inspect_err(|_| self.unload()),
            None => Ok(()),
        }
    }

    fn allocate_scratch(&mut self, bytes: usize) -> Result<(), RunError> {
        let buffer = Buffer::new(self.runtime.cuda(), bytes, "the engines' scratch memory")?;
        for loaded in self.slots.iter_mut().filter_map(|slot| slot.loaded.as_mut()) {
            // SAFETY: as in `share_scratch`: it is stored in `self.scratch` below.
            unsafe { loaded.program.set_scratch(&buffer) };
        }
        self.scratch = Some(buffer);
        Ok(())
    }

    /// Engines are loaded again on their next use.
    pub(super) fn unload(&mut self) {
        for slot in &mut self.slots {
            slot.loaded = None;
        }
        self.last = None;
    }

    /// The largest capacity that can already be decoded at.
    fn loaded_capacity(&self) -> Option<usize> {
        let ready = self.slots.iter().filter(|slot| slot.loaded.is_some());
        let decode = ready.filter(|slot| covers(slot.profile.tokens, 1));
        decode.map(|slot| slot.profile.capacity).max()
    }
}
