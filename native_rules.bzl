"""Repositories that older versions of Bazel would download to get rules they have built in."""

def _write(repository_ctx):
    attributes = repository_ctx.attr
    repository_ctx.file("WORKSPACE", "workspace(name = %r)\n" % attributes.name)
    if attributes.filegroup:
        repository_ctx.file("BUILD", "filegroup(name = %r, visibility = [%r])\n" % (
            attributes.filegroup,
            "//visibility:public",
        ))
    if attributes.package:
        repository_ctx.file(attributes.package + "/BUILD")
        repository_ctx.file(attributes.package + "/defs.bzl", "".join([
            "%s = native.%s\n" % (rule, rule)
            for rule in attributes.rules
        ]))

native_rules = repository_rule(
    implementation = _write,
    doc = "Passes the built-in rules on as //package:defs.bzl; an empty filegroup where one is named.",
    attrs = {
        "filegroup": attr.string(),
        "package": attr.string(),
        "rules": attr.string_list(),
    },
)
