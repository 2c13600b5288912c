"""Names of CPUID feature bits for error messages, as Linux writes them in /proc/cpuinfo and KVM in its documentation.

One row per register: (leaf, index, register) → names from bit 0 on, "." for bits without a name.
"""

from __future__ import annotations

_NAMES: dict[tuple[int, int, str], str] = {
    (0x1, 0, "ecx"): (
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm "
        ". pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"
    ),
    (0x1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic . sep mtrr pge mca cmov "
        "pat pse36 pn clflush . dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (0x7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a "
        "avx512f avx512dq rdseed adx smap avx512ifma . clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni "
        "avx512bw avx512vl"
    ),
    (0x7, 0, "ecx"): (
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni "
        "avx512_bitalg tme avx512_vpopcntdq . la57 . . . . . rdpid kl bus_lock_detect cldemote . movdiri movdir64b "
        "enqcmd sgx_lc pks"
    ),
    (0x7, 0, "edx"): (
        ". . avx512_4vnniw avx512_4fmaps fsrm uintr . . avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort . "
        "tsx_force_abort serialize hybrid_cpu tsxldtrk . pconfig arch_lbr ibt . amx_bf16 avx512_fp16 amx_tile "
        "amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd"
    ),
    (0x7, 1, "eax"): (
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext . fzrm fsrs fsrc . . . "
        ". fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma . . lam msrlist"
    ),
    (0x7, 1, "edx"): (
        ". . . . avx_vnni_int8 avx_ne_convert . . amx_complex . avx_vnni_int16 . . . prefetchiti . . . . avx10"
    ),
    (0x7, 2, "edx"): "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uc_lock_dis",
    (0x8000_0001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt . lwp "
        "fma4 tce . nodeid_msr . tbm topoext perfctr_core perfctr_nb . bpext ptsc perfctr_llc mwaitx"
    ),
    (0x8000_0001, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic . syscall mtrr pge mca cmov "
        "pat pse36 . mp nx . mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp . lm 3dnowext 3dnow"
    ),
    (0x4000_0001, 0, "eax"): (
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt . "
        "kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int "
        "kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control . . . . . . kvmclock_stable"
    ),
}  # fmt: skip


def feature_name(leaf: int, index: int, register: str, bit: int) -> str:
    """The name of a feature bit, or "unnamed"."""
    names = _NAMES.get((leaf, index, register), "").split()
    return names[bit] if bit < len(names) and names[bit] != "." else "unnamed"
