// The driver. One symbol of it is used, by kernels that the dry run never reaches.
extern "C" int cuTensorMapEncodeTiled(...) { return 801; /* CUDA_ERROR_NOT_SUPPORTED */ }
