def config(args, nhwc):
    cin = args.x.shape[1]
    bk = 64 if cin > 32 else 32 if cin > 16 else 16
    return dict(run=256, BLOCK_M=64, BLOCK_N=16, BLOCK_K=bk, BLOCK_P=64, BLOCK_C=16, HOIST=True, ONE_K=cin <= bk, num_warps=4, num_stages=3)
