// Browsers do not run modules of a page that is opened from disk: this says what to do.

if (window.location.protocol === 'file:') {
  const status = document.getElementById('status');
  status.classList.add('is-fault');
  status.textContent =
    'Open this page through a web server. In its folder, run: python3 -m http.server --bind ' +
    '127.0.0.1 8000, and open http://127.0.0.1:8000.';
}
