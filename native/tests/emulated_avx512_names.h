// The intrinsics that kernels call, by their names: each means its form in software (emulated_avx512.h, which includes this last).
#pragma once

// GCC has some of them as macros where it does not optimise
#undef _mm512_add_epi32
#undef _mm512_add_epi8
#undef _mm512_add_ps
#undef _mm512_and_si512
#undef _mm512_broadcast_f32x4
#undef _mm512_broadcast_i32x4
#undef _mm512_castpd_ps
#undef _mm512_castps128_ps512
#undef _mm512_castps512_ps256
#undef _mm512_castps_pd
#undef _mm512_castps_si512
#undef _mm512_castsi128_si512
#undef _mm512_castsi512_ps
#undef _mm512_cmp_ps_mask
#undef _mm512_cmpgt_epi32_mask
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtps_ph
#undef _mm512_dpbusd_epi32
#undef _mm512_extractf32x8_ps
#undef _mm512_fmadd_ps
#undef _mm512_gf2p8affine_epi64_epi8
#undef _mm512_insertf32x4
#undef _mm512_inserti32x4
#undef _mm512_load_ps
#undef _mm512_load_si512
#undef _mm512_loadu_ps
#undef _mm512_loadu_si512
#undef _mm512_madd_epi16
#undef _mm512_maddubs_epi16
#undef _mm512_mask_add_epi8
#undef _mm512_mask_or_epi32
#undef _mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_epi16
#undef _mm512_maskz_set1_epi8
#undef _mm512_maskz_sub_ps
#undef _mm512_max_ps
#undef _mm512_min_ps
#undef _mm512_movm_epi32
#undef _mm512_mul_ps
#undef _mm512_or_si512
#undef _mm512_permutex2var_epi32
#undef _mm512_permutexvar_epi32
#undef _mm512_permutexvar_ps
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_ps
#undef _mm512_roundscale_ps
#undef _mm512_scalef_ps
#undef _mm512_set1_epi16
#undef _mm512_set1_epi32
#undef _mm512_set1_epi64
#undef _mm512_set1_epi8
#undef _mm512_set1_ps
#undef _mm512_set_epi32
#undef _mm512_set_epi64
#undef _mm512_set_ps
#undef _mm512_setzero_ps
#undef _mm512_setzero_si512
#undef _mm512_shuffle_epi8
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi32
#undef _mm512_sqrt_ps
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_store_si512
#undef _mm512_storeu_ps
#undef _mm512_storeu_si512
#undef _mm512_sub_epi8
#undef _mm512_sub_ps
#undef _mm512_test_epi32_mask
#undef _mm512_test_epi8_mask
#undef _mm512_unpackhi_epi16
#undef _mm512_unpackhi_epi32
#undef _mm512_unpackhi_epi64
#undef _mm512_unpackhi_epi8
#undef _mm512_unpackhi_pd
#undef _mm512_unpackhi_ps
#undef _mm512_unpacklo_epi16
#undef _mm512_unpacklo_epi32
#undef _mm512_unpacklo_epi64
#undef _mm512_unpacklo_epi8
#undef _mm512_unpacklo_pd
#undef _mm512_unpacklo_ps
#undef _mm_mask_mov_epi8
#undef _mm_maskz_loadu_epi8

#define _mm512_add_epi32 emulated_512::add_epi32
#define _mm512_add_epi8 emulated_512::add_epi8
#define _mm512_add_ps emulated_512::add_ps
#define _mm512_and_si512 emulated_512::and_si512
#define _mm512_broadcast_f32x4(a) emulated_512::four_times<__m512>(a)
#define _mm512_broadcast_i32x4(a) emulated_512::four_times<__m512i>(a)
#define _mm512_castpd_ps(a) emulated_512::bits_of<__m512>(a)
#define _mm512_castps128_ps512(a) emulated_512::lowest_quarter<__m512>(a)
#define _mm512_castps512_ps256(a) emulated_512::half_of(a, 0)
#define _mm512_castps_pd(a) emulated_512::bits_of<__m512d>(a)
#define _mm512_castps_si512(a) emulated_512::bits_of<__m512i>(a)
#define _mm512_castsi128_si512(a) emulated_512::lowest_quarter<__m512i>(a)
#define _mm512_castsi512_ps(a) emulated_512::bits_of<__m512>(a)
#define _mm512_cmp_ps_mask emulated_512::cmp_ps_mask
#define _mm512_cmpgt_epi32_mask emulated_512::cmpgt_epi32_mask
#define _mm512_cvtepi32_epi16(a) emulated_512::narrowed<uint16_t, __m256i>(a)
#define _mm512_cvtepi32_epi8(a) emulated_512::narrowed<uint8_t, __m128i>(a)
#define _mm512_cvtepi32_ps emulated_512::cvtepi32_ps
#define _mm512_cvtepi8_epi32(a) emulated_512::widened<int8_t>(a)
#define _mm512_cvtepu16_epi32(a) emulated_512::widened<uint16_t>(a)
#define _mm512_cvtne2ps_pbh emulated_512::cvtne2ps_pbh
#define _mm512_dpbf16_ps(sum, a, b) emulated_512::dpbf16_ps(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtneps_pbh emulated_512::cvtneps_pbh
#define _mm512_cvtph_ps emulated_512::cvtph_ps
#define _mm512_cvtps_epi32 emulated_512::cvtps_epi32
#define _mm512_cvtps_ph emulated_512::cvtps_ph
#define _mm512_dpbusd_epi32 emulated_512::dpbusd_epi32
#define _mm512_extractf32x8_ps(a, which) emulated_512::half_of(a, which)
#define _mm512_fmadd_ps emulated_512::fmadd_ps
#define _mm512_gf2p8affine_epi64_epi8 emulated_512::gf2p8affine_epi64_epi8
#define _mm512_insertf32x4(a, b, where) emulated_512::insert_quarter<__m512>(a, b, where)
#define _mm512_inserti32x4(a, b, where) emulated_512::insert_quarter<__m512i>(a, b, where)
#define _mm512_load_ps(p) emulated_512::load<__m512>(p)
#define _mm512_load_si512(p) emulated_512::load<__m512i>(p)
#define _mm512_loadu_ps(p) emulated_512::load<__m512>(p)
#define _mm512_loadu_si512(p) emulated_512::load<__m512i>(p)
#define _mm512_madd_epi16 emulated_512::madd_epi16
#define _mm512_maddubs_epi16 emulated_512::maddubs_epi16
#define _mm512_mask_add_epi8 emulated_512::mask_add_epi8
#define _mm512_mask_or_epi32 emulated_512::mask_or_epi32
#define _mm512_mask_storeu_ps emulated_512::mask_storeu_ps
#define _mm512_maskz_loadu_epi16(mask, p) emulated_512::load_some<__m512i, int16_t>(mask, p)
#define _mm512_maskz_set1_epi8 emulated_512::maskz_set1_epi8
#define _mm512_maskz_sub_ps emulated_512::maskz_sub_ps
#define _mm512_max_ps emulated_512::max_ps
#define _mm512_min_ps emulated_512::min_ps
#define _mm512_movm_epi32 emulated_512::movm_epi32
#define _mm512_mul_ps emulated_512::mul_ps
#define _mm512_or_si512 emulated_512::or_si512
#define _mm512_permutex2var_epi32 emulated_512::permute_two
#define _mm512_permutexvar_epi32(order, a) emulated_512::permute<__m512i>(order, a)
#define _mm512_permutexvar_ps(order, a) emulated_512::permute<__m512>(order, a)
#define _mm512_reduce_add_ps emulated_512::reduce_add_ps
#define _mm512_reduce_max_ps emulated_512::reduce_max_ps
#define _mm512_reduce_ps(a, how) emulated_512::rest_ps(a, how)
#define _mm512_roundscale_ps emulated_512::roundscale_ps
#define _mm512_scalef_ps emulated_512::scalef_ps
#define _mm512_set1_epi16 emulated_512::set1_epi16
#define _mm512_set1_epi32 emulated_512::set1_epi32
#define _mm512_set1_epi64 emulated_512::set1_epi64
#define _mm512_set1_epi8 emulated_512::set1_epi8
#define _mm512_set1_ps emulated_512::set1_ps
#define _mm512_set_epi32(...) emulated_512::listed<__m512i, int32_t>(__VA_ARGS__)
#define _mm512_set_epi64(...) emulated_512::listed<__m512i, int64_t>(__VA_ARGS__)
#define _mm512_set_ps(...) emulated_512::listed<__m512, float>(__VA_ARGS__)
#define _mm512_setzero_ps() emulated_512::set1_ps(0.0f)
#define _mm512_setzero_si512() emulated_512::set1_epi32(0)
#define _mm512_shuffle_epi8 emulated_512::shuffle_epi8
#define _mm512_shuffle_f32x4(a, b, order) emulated_512::shuffle_quarters<__m512>(a, b, order)
#define _mm512_shuffle_i32x4(a, b, order) emulated_512::shuffle_quarters<__m512i>(a, b, order)
#define _mm512_shuffle_ps emulated_512::shuffle_ps
#define _mm512_slli_epi32 emulated_512::slli_epi32
#define _mm512_sqrt_ps emulated_512::sqrt_ps
#define _mm512_srli_epi16 emulated_512::srli_epi16
#define _mm512_srli_epi32 emulated_512::srli_epi32
#define _mm512_store_si512(p, a) emulated_512::store(p, a)
#define _mm512_storeu_ps(p, a) emulated_512::store(p, a)
#define _mm512_storeu_si512(p, a) emulated_512::store(p, a)
#define _mm512_sub_epi8 emulated_512::sub_epi8
#define _mm512_sub_ps emulated_512::sub_ps
#define _mm512_test_epi32_mask emulated_512::test_epi32_mask
#define _mm512_test_epi8_mask emulated_512::test_epi8_mask
#define _mm512_unpackhi_epi16 emulated_512::unpackhi_epi16
#define _mm512_unpackhi_epi32 emulated_512::unpackhi_epi32
#define _mm512_unpackhi_epi64 emulated_512::unpackhi_epi64
#define _mm512_unpackhi_epi8 emulated_512::unpackhi_epi8
#define _mm512_unpackhi_pd emulated_512::unpackhi_pd
#define _mm512_unpackhi_ps emulated_512::unpackhi_ps
#define _mm512_unpacklo_epi16 emulated_512::unpacklo_epi16
#define _mm512_unpacklo_epi32 emulated_512::unpacklo_epi32
#define _mm512_unpacklo_epi64 emulated_512::unpacklo_epi64
#define _mm512_unpacklo_epi8 emulated_512::unpacklo_epi8
#define _mm512_unpacklo_pd emulated_512::unpacklo_pd
#define _mm512_unpacklo_ps emulated_512::unpacklo_ps
#define _mm_mask_mov_epi8(no, mask, yes) emulated_512::mask_mov_epi8(no, mask, yes)
#define _mm_maskz_loadu_epi8(mask, p) emulated_512::load_some<__m128i, int8_t>(mask, p)
