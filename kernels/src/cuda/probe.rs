//! What of CUDA this machine has, without needing any of it: for `openlora doctor` and for errors.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::path::PathBuf;

use cudarc::driver::sys as cu;

use super::context::CUDA_MIN;
use super::library::{CublasLt, Cuda, Missing, Nvrtc, Places};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The driver and its GPUs.
    pub driver: Result<DriverReport, Missing>,
    /// The compiler of kernels.
    pub nvrtc: Result<LibraryReport, Missing>,
    /// Matrix products.
    pub cublaslt: Result<LibraryReport, Missing>,
}

/// The driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverReport {
    /// The file of its library.
    pub file: PathBuf,
    /// The newest CUDA it can run.
    pub cuda: (u32, u32),
    /// Its GPUs, or why it has none to offer.
    pub devices: Result<Vec<DeviceReport>, String>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub compute: (u32, u32),
    /// Bytes of its memory.
    pub memory_total: usize,
    /// Bytes nobody has taken; none where it cannot be used, as with a GPU that another process holds for itself.
    pub memory_free: Option<usize>,
}

/// A library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryReport {
    /// Its file.
    pub file: PathBuf,
    /// CUDA's version it belongs to.
    pub cuda: (u32, u32),
}

/// Looks for all of it.
#[must_use]
pub fn probe(places: &Places) -> Probe {
    let driver = Cuda::load(places, None).map(|cuda| report(&cuda));
    let newest = driver.as_ref().ok().map(|driver| driver.cuda.0);
    Probe {
        nvrtc: Nvrtc::load(places, newest).map(|nvrtc| LibraryReport { cuda: nvrtc.version(), file: nvrtc.file }),
        cublaslt: CublasLt::load(places, newest).map(|blas| {
            let (major, minor, _) = blas.version();
            LibraryReport { cuda: (major, minor), file: blas.file }
        }),
        driver,
    }
}

impl Probe {
    /// Whether there is a GPU and everything that it takes to use it.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.device(None).is_ok()
    }

    /// The GPU of that number, or the first that can be used, with its number.
    ///
    /// # Errors
    /// What is missing, in words.
    pub fn device(&self, number: Option<u32>) -> Result<(u32, &DeviceReport), String> {
        let driver = self.driver.as_ref().map_err(|missing| format!("driver: {missing}"))?;
        let devices = driver.devices.as_ref().map_err(|reason| format!("no GPU: {reason}"))?;
        if driver.cuda < CUDA_MIN {
            let ((major, minor), (least, least_minor)) = (driver.cuda, CUDA_MIN);
            return Err(format!("the driver is for CUDA {major}.{minor}; {least}.{least_minor} or newer is needed"));
        }
        self.nvrtc.as_ref().map_err(|missing| format!("NVRTC: {missing}"))?;
        self.cublaslt.as_ref().map_err(|missing| format!("cuBLASLt: {missing}"))?;
        let mut numbered = (0..).zip(devices);
        match number {
            Some(number) => {
                let found = numbered.find(|(at, _)| *at == number);
                let found = found.ok_or_else(|| format!("there is no cuda:{number}, of {} GPUs", devices.len()))?;
                found.1.unfit().map_or(Ok(found), |why| Err(format!("cuda:{number} {why}")))
            }
            None => {
                let found = numbered.find(|(_, device)| device.unfit().is_none());
                found.ok_or_else(|| {
                    let why =
                        (0..).zip(devices).filter_map(|(at, device)| Some(format!("cuda:{at} {}", device.unfit()?)));
                    why.reduce(|all, next| format!("{all}; {next}")).unwrap_or_else(|| "the driver has no GPU".into())
                })
            }
        }
    }

    /// Whether there is a sign of a GPU, so that what is missing is worth telling.
    #[must_use]
    pub fn expected(&self) -> bool {
        self.driver.is_ok()
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Err(missing) => write!(f, "driver: {missing}")?,
            Ok(driver) => {
                write!(f, "driver for CUDA {}.{} ({})", driver.cuda.0, driver.cuda.1, driver.file.display())?;
                match &driver.devices {
                    Err(reason) => write!(f, "; no GPU: {reason}")?,
                    Ok(devices) => {
                        for (number, device) in devices.iter().enumerate() {
                            write!(f, "; cuda:{number} {device}")?;
                        }
                    }
                }
            }
        }
        for (what, found) in [("NVRTC", &self.nvrtc), ("cuBLASLt", &self.cublaslt)] {
            match found {
                Ok(library) => {
                    write!(f, "; {what} {}.{} ({})", library.cuda.0, library.cuda.1, library.file.display())?;
                }
                Err(missing) => write!(f, "; {what}: {missing}")?,
            }
        }
        Ok(())
    }
}

impl DeviceReport {
    /// Why it cannot be used.
    fn unfit(&self) -> Option<String> {
        let (major, minor) = self.compute;
        if self.compute < (7, 5) {
            return Some(format!("has compute capability {major}.{minor}; 7.5 or newer is needed"));
        }
        self.memory_free.is_none().then(|| "is in use by another process or broken".to_owned())
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute;
        write!(f, "{}, compute capability {major}.{minor}, ", self.name)?;
        match self.memory_free {
            Some(free) => write!(f, "{} of {} MiB free", free >> 20, self.memory_total >> 20),
            None => write!(f, "{} MiB, in use by another process or broken", self.memory_total >> 20),
        }
    }
}

fn report(cuda: &Cuda) -> DriverReport {
    let mut version = 0;
    // SAFETY: a place for a number; this function may be called before cuInit.
    unsafe { (cuda.cuDriverGetVersion)(&mut version) };
    let version = version.max(0).cast_unsigned();
    DriverReport {
        file: cuda.file.clone(),
        // 13000 is 13.0, 12080 is 12.8.
        cuda: (version / 1000, version % 1000 / 10),
        devices: devices(cuda),
    }
}

fn devices(cuda: &Cuda) -> Result<Vec<DeviceReport>, String> {
    let checked = |status: u32| if status == 0 { Ok(()) } else { Err(cuda.explain(status)) };
    // SAFETY: 0 is the only flag there is.
    checked(unsafe { (cuda.cuInit)(0) })?;
    let mut count = 0;
    // SAFETY: a place for a number, after cuInit.
    checked(unsafe { (cuda.cuDeviceGetCount)(&mut count) })?;
    (0..count).map(|ordinal| device(cuda, ordinal).map_err(|status| cuda.explain(status))).collect()
}

fn device(cuda: &Cuda, ordinal: c_int) -> Result<DeviceReport, u32> {
    let device = cuda.device(ordinal)?;
    let mut total = 0;
    // SAFETY: a place for a number and a device that the driver gave.
    checked(unsafe { (cuda.cuDeviceTotalMem_v2)(&mut total, device) })?;
    Ok(DeviceReport {
        name: cuda.device_name(device)?,
        compute: cuda.compute(device)?,
        memory_total: total,
        memory_free: memory_free(cuda, device),
    })
}

/// Asks through a context of the device's, which is given back.
fn memory_free(cuda: &Cuda, device: cu::CUdevice) -> Option<usize> {
    let mut context = std::ptr::null_mut();
    // SAFETY: a place for the context of a device that the driver gave.
    checked(unsafe { (cuda.cuDevicePrimaryCtxRetain)(&mut context, device) }).ok()?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: the context was just retained; null takes it from this thread before it is released, once, as it was retained.
    let asked = unsafe {
        let asked = checked((cuda.cuCtxSetCurrent)(context))
            .and_then(|()| checked((cuda.cuMemGetInfo_v2)(&mut free, &mut total)));
        (cuda.cuCtxSetCurrent)(std::ptr::null_mut());
        (cuda.cuDevicePrimaryCtxRelease_v2)(device);
        asked
    };
    asked.ok().map(|()| free)
}

fn checked(status: u32) -> Result<(), u32> {
    if status == 0 { Ok(()) } else { Err(status) }
}

impl Cuda {
    /// A device by number.
    pub(crate) fn device(&self, ordinal: c_int) -> Result<cu::CUdevice, u32> {
        let mut device = 0;
        // SAFETY: a place for a device; any number may be asked for.
        checked(unsafe { (self.cuDeviceGet)(&mut device, ordinal) })?;
        Ok(device)
    }

    /// A device's name.
    pub(crate) fn device_name(&self, device: cu::CUdevice) -> Result<String, u32> {
        let mut name = [0_u8; 256];
        // SAFETY: room for as many bytes as is said, and a device that the driver gave.
        checked(unsafe { (self.cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as c_int, device) })?;
        Ok(CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned()))
    }

    /// A device's compute capability.
    pub(crate) fn compute(&self, device: cu::CUdevice) -> Result<(u32, u32), u32> {
        use cu::CUdevice_attribute as Attribute;
        Ok((
            self.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            self.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ))
    }

    /// A number about a device.
    pub(crate) fn attribute(&self, device: cu::CUdevice, which: cu::CUdevice_attribute) -> Result<u32, u32> {
        let mut value = 0;
        // SAFETY: a place for a number, an attribute of the header's and a device that the driver gave.
        checked(unsafe { (self.cuDeviceGetAttribute)(&mut value, which, device) })?;
        Ok(value.max(0).cast_unsigned())
    }

    /// An error's name and text, as the driver has them.
    pub(crate) fn explain(&self, status: u32) -> String {
        type Theirs = unsafe extern "C" fn(cu::CUresult, *mut *const c_char) -> u32;
        type Ours = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;
        let text = |function: Theirs| {
            // SAFETY: the same function, with its enum as the number that it is in C: it takes any.
            let function = unsafe { std::mem::transmute::<Theirs, Ours>(function) };
            let mut text = std::ptr::null();
            // SAFETY: any number may be asked for; what comes back is null or a string that ends in NUL and stays.
            unsafe {
                if function(status, &mut text) != 0 || text.is_null() {
                    return None;
                }
                Some(CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        match (text(self.cuGetErrorName), text(self.cuGetErrorString)) {
            (Some(name), Some(words)) => format!("{name} ({status}): {words}"),
            _ => format!("error {status} of the driver"),
        }
    }
}
