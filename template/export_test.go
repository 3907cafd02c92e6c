package template

// For tests from outside.
var (
	ExtractELFFrom   = extractELF
	ReleaseOf        = releaseOf
	ParseModinfo     = parseModinfo
	ParseModinfoText = parseModinfoText
	ParseBuiltin     = parseBuiltin
	PackInitramfs    = packInitramfs
	ReadKernel       = readKernel
)
