"""The doctor's verdicts on what is installed: the same everywhere, and parts that fit each other."""

from collections.abc import Sequence

from bitfleet.launch.doctor.facts import Facts
from bitfleet.launch.doctor.table import Check, Verdict, by_value, differ, who


def check_versions(facts: Sequence[Facts]) -> list[Check]:
    """Python, C library and packages are there, and the same on all ranks."""
    checks = []
    for name in facts[0].versions:

        def version(each: Facts, name: str = name) -> str:
            return each.versions[name]

        value = by_value(facts, version)
        if differ(facts, version):
            verdict: Verdict = "WARN" if name == "C library" else "FAIL"
            checks.append(Check(name, value, verdict, "give every host the same environment"))
        elif "not installed" in value and name != "bitfleet":  # which may run from a checkout
            checks.append(Check(name, value, "FAIL", "pip install ."))
        else:
            checks.append(Check(name, value))
    return checks


def check_git(facts: Sequence[Facts]) -> Check:
    """All ranks run the same code."""
    value = by_value(facts, lambda each: each.git or "not a git checkout")
    if differ(facts, lambda each: each.git):
        return Check("git revision", value, "FAIL", "check out the same revision on every host")
    return Check("git revision", value)


def check_cuda(facts: Sequence[Facts]) -> Check:
    """What torch was built with is the same on all ranks."""

    def build(each: Facts) -> str:
        cuda = f"CUDA {each.torch_cuda}" if each.torch_cuda else "no CUDA"
        return f"{cuda}, NCCL {each.nccl or 'none'}, C++11 ABI {'yes' if each.cxx11_abi else 'no'}"

    if differ(facts, build):
        return Check("torch's build", by_value(facts, build), "FAIL", "install the same torch on every host")
    if any(each.devices and each.nccl is None for each in facts):
        return Check("torch's build", by_value(facts, build), "FAIL", "GPUs need a torch that was built with NCCL")
    return Check("torch's build", by_value(facts, build))


def check_dali(facts: Sequence[Facts], wanted: bool) -> Check:
    """One wheel of DALI, of torch's CUDA, the same on all ranks."""

    def wheels(each: Facts) -> str:
        return ", ".join(f"{name} {version}" for name, version in each.dali.items()) or "none"

    def fits(each: Facts) -> bool:
        major = (each.torch_cuda or "").split(".")[0]
        return not major or all(name.endswith(f"cuda{major}0") for name in each.dali)

    value = by_value(facts, wheels)
    if missing := [each for each in facts if not each.dali]:
        advice = "pip install '.[dali-cu13]' (or dali-cu12), or --data.loader torch"
        return Check("DALI", f"none on {who(missing)}", "FAIL" if wanted else "WARN", advice)
    if double := [each for each in facts if len(each.dali) > 1]:
        advice = "both wheels install the same files: uninstall both, then install one"
        return Check("DALI", f"two wheels on {who(double)}", "FAIL", advice)
    if differ(facts, wheels):
        return Check("DALI", value, "FAIL", "install the same DALI on every host")
    if not all(map(fits, facts)):
        verdict: Verdict = "FAIL" if any(each.devices for each in facts) else "WARN"
        return Check(
            "DALI", value, verdict, f"torch is built for CUDA {facts[0].torch_cuda}: install DALI's wheel for it"
        )
    return Check("DALI", value)


def check_compiler(facts: Sequence[Facts]) -> Check:
    """torch.compile needs a C++ compiler; on GPUs the update of the binary weights goes through it."""
    value = by_value(facts, lambda each: each.compiler or "none")
    if missing := [each for each in facts if each.compiler is None]:
        advice = f"install g++ on {who(missing)}: without it the update of binary weights is slow on GPUs"
        return Check("C++ compiler", value, "WARN", advice)
    return Check("C++ compiler", value)


def check_c_compiler(facts: Sequence[Facts]) -> Check:
    """Kernels for the CPU are built by a C compiler; Triton needs one and Python.h to launch those for a GPU."""

    def tools(each: Facts) -> str:
        return f"{each.c_compiler or 'none'}, {'' if each.python_header else 'no '}Python.h"

    value = by_value(facts, tools)
    if missing := [each for each in facts if each.c_compiler is None]:
        return Check("C compiler", value, "WARN", f"install gcc on {who(missing)}: without it steps are slow")
    if missing := [each for each in facts if each.devices and not each.python_header]:
        advice = f"install Python's headers (python3-dev) on {who(missing)}: without them Triton cannot launch a kernel"
        return Check("C compiler", value, "WARN", advice)
    return Check("C compiler", value)


def check_gpu_kernels(facts: Sequence[Facts]) -> Check:
    """The update of binary weights on each GPU, tried there: it is built, and has the bits of the CPU's."""

    def result(each: Facts) -> str:
        return (
            "no GPU"
            if each.gpu_kernel is None
            else "not as they should be"
            if each.gpu_kernel
            else "built, run, equal bits"
        )

    value = by_value(facts, result)
    if failed := [each for each in facts if each.gpu_kernel]:
        return Check("GPU kernels", value, "FAIL", f"{failed[0].gpu_kernel} on {who(failed)}")
    return Check("GPU kernels", value)


def check_kernels(facts: Sequence[Facts]) -> Check:
    """The compiled update of binary weights on the CPU."""
    value = by_value(facts, lambda each: "built" if each.kernels is None else "eager torch")
    if failed := [each for each in facts if each.kernels is not None]:
        return Check("CPU kernels", value, "WARN", f"{failed[0].kernels} on {who(failed)}")
    return Check("CPU kernels", value)


def check_config(facts: Sequence[Facts]) -> Check:
    """All ranks read the same configuration."""
    value = by_value(facts, lambda each: str(each.config)[:12])
    if differ(facts, lambda each: each.config):
        return Check("configuration", value, "FAIL", "the hosts have other files in configs/ or other options")
    return Check("configuration", value)
