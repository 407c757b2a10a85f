// A page that is opened as a file may start no worker, so its search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inner = frame.contentWindow
      this.loaded = new Promise(resolve => { frame.onload = resolve })
      window.addEventListener("message", event => {
        if (event.source === this.inner)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      this.inner.document.open()
      this.inner.document.write(`<body><script>
        window.postMessage = message => parent.postMessage(message, "*")
        window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() =>
          new Promise(resolve => {
            const script = document.createElement("script")
            script.src = url
            script.onload = resolve
            document.body.appendChild(script)
          })), Promise.resolve())
      <\/script><script src="${url}"><\/script></body>`)
      this.inner.document.close()
    }
    postMessage(data) {
      this.loaded.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
